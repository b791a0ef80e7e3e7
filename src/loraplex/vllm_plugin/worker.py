"""Where a worker's LoRA manager is made: loraplex's in the place of vLLM's."""

from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.models import supports_lora

from loraplex.errors import ConfigError, UnsupportedEngineError
from loraplex.vllm_plugin.compat import check_compat
from loraplex.vllm_plugin.cuda_graphs import keep_mixtures_out_of_full_graphs
from loraplex.vllm_plugin.options import options_from
from loraplex.vllm_plugin.refusals import check_config
from loraplex.vllm_plugin.residual_pass import ResidualPass
from loraplex.vllm_plugin.scaling_pass import BatchScalingPass
from loraplex.vllm_plugin.second_cache import SecondCache, attention_layers
from loraplex.vllm_plugin.worker_manager import LinkWorkerManager

logger = init_logger(__name__)


def load_lora_model(runner: Any, model: nn.Module, vllm_config: VllmConfig, device: torch.device) -> nn.Module:
    """What vLLM's `LoRAModelRunnerMixin.load_lora_model` does, with links and, if asked for, mixtures."""
    options = options_from(vllm_config.additional_config)
    if options is None:
        raise ConfigError("load_lora_model of loraplex was called, but additional_config doesn't ask for it.")
    check_compat()
    check_config(vllm_config, options)
    if not supports_lora(model):
        raise UnsupportedEngineError(f"vLLM doesn't support LoRA on {type(model).__name__}. Serve another base model.")
    runner.lora_manager = LinkWorkerManager(vllm_config, device, model.embedding_modules, options)  # type: ignore[arg-type]
    wrapped: nn.Module = runner.lora_manager.create_lora_manager(model, vllm_config)
    manager = runner.lora_manager._adapter_manager
    registry = vllm_config.compilation_config.static_forward_context
    attention = attention_layers(registry, options.asked_for) if options.needs_attention else {}
    if options.mixtures:
        cache = SecondCache(registry, attention)
        runner.loraplex_scaling_pass = BatchScalingPass(manager.gates, cache, manager.wrapper, runner)
        runner.loraplex_scaling_pass.attach(wrapped)
        keep_mixtures_out_of_full_graphs(runner, manager)
        logger.info("loraplex: mixtures are on, with %d second caches.", len(cache.copies))
    if options.has_residuals or options.attention:
        manager.serve_residuals(registry, attention)
        runner.loraplex_residual_pass = ResidualPass(manager.residuals, manager.reader, runner)
        runner.loraplex_residual_pass.attach(wrapped)
        logger.info("loraplex: residuals are on, with %d caches for linked ones in a layer.", options.linked)
    return wrapped
