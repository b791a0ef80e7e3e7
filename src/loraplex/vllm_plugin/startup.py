"""What happens in the process that makes vLLM's configuration: checks, and the resolver of names."""

from vllm.config import VllmConfig
from vllm.lora.resolver import LoRAResolverRegistry

from loraplex.errors import ConfigError
from loraplex.vllm_plugin.catalog import FolderCatalog
from loraplex.vllm_plugin.compat import check_compat
from loraplex.vllm_plugin.lora_ids import check_requests
from loraplex.vllm_plugin.options import options_from
from loraplex.vllm_plugin.refusals import check_config
from loraplex.vllm_plugin.resolver import LinkResolver
from loraplex.vllm_plugin.worker_extension import EXTENSION

RESOLVER = "loraplex"  # its name in vLLM's registry


def start_front(config: VllmConfig) -> None:
    """Check vLLM and the configuration, and register the resolver.

    Raises CompatibilityError and UnsupportedEngineError.
    """
    options = options_from(config.additional_config)
    if options is None:
        raise ConfigError("start_front of loraplex was called, but additional_config doesn't ask for it.")
    check_compat()
    check_config(config, options)
    if (options.mixtures or options.attention) and not config.parallel_config.worker_extension_cls:
        config.parallel_config.worker_extension_cls = EXTENSION  # so that scalings and captures can be asked for
    check_requests()
    LoRAResolverRegistry.resolvers.pop(RESOLVER, None)  # of an engine that was configured before in this process
    LoRAResolverRegistry.register_resolver(RESOLVER, LinkResolver(FolderCatalog(options)))
