"""The entry point `vllm.general_plugins`: vLLM calls it in every process, whether the plugin is asked for or not."""

import functools
import logging
from typing import Any

logger = logging.getLogger(__name__)

_MARK = "_loraplex"  # on functions that stand in for vLLM's: a second call changes nothing


def register() -> None:
    """Put two doors into vLLM that open only where `additional_config` names loraplex.

    One in the process that makes the configuration: it checks vLLM and the configuration, and registers the resolver.
    One in the workers: it puts loraplex's LoRA manager in the place of vLLM's. Everything else waits behind them.
    """
    try:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

        create_engine_config = EngineArgs.create_engine_config
        load_lora_model = LoRAModelRunnerMixin.load_lora_model
    except (ImportError, AttributeError) as error:  # another vLLM, whose users may not want loraplex at all
        logger.warning("loraplex can't be used with this vLLM: %s. It knows vLLM 0.32 (docs/vllm.md).", error)
        return
    if getattr(create_engine_config, _MARK, False):
        return

    @functools.wraps(create_engine_config)
    def checked_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = create_engine_config(self, *args, **kwargs)
        if _is_asked_for(config):
            from loraplex.vllm_plugin.startup import start_front

            start_front(config)
        return config

    @functools.wraps(load_lora_model)
    def load_with_loraplex(self: Any, model: Any, vllm_config: Any, device: Any) -> Any:
        if not _is_asked_for(vllm_config):
            return load_lora_model(self, model, vllm_config, device)
        from loraplex.vllm_plugin.worker import load_lora_model as load

        return load(self, model, vllm_config, device)

    setattr(checked_engine_config, _MARK, True)
    EngineArgs.create_engine_config = checked_engine_config
    LoRAModelRunnerMixin.load_lora_model = load_with_loraplex


def _is_asked_for(config: Any) -> bool:
    from loraplex.vllm_plugin.options import options_from

    return options_from(config.additional_config) is not None
