"""What is not known to be right is refused by name, before the engine starts."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm import envs
from vllm.compilation.breakable_cudagraph import is_breakable_cudagraph_enabled
from vllm.config import CompilationMode, CUDAGraphMode, VllmConfig
from vllm.platforms import current_platform

from loraplex.errors import UnsupportedEngineError
from loraplex.vllm_plugin.options import PluginOptions


@dataclass(frozen=True)
class Refusal:
    """A way to run vLLM that goes with neither, or not with mixtures."""

    name: str  # vLLM's name for it
    is_on: Callable[[VllmConfig], Any]
    why: str
    fix: str
    with_routers: bool = False  # whether it goes with mixtures in one pass, and residuals without caches, neither


_ALWAYS = (
    Refusal("LoRA off", lambda c: c.lora_config is None, "there is nothing to link", "Add enable_lora (--enable-lora)"),
    Refusal(
        "a pooling runner",
        lambda c: c.model_config.runner_type == "pooling",
        "only generation was tested",
        "Serve it without loraplex",
    ),
    Refusal(
        "pipeline_parallel_size > 1",
        lambda c: c.parallel_config.pipeline_parallel_size > 1,
        "hidden states, and so gates, exist on the last stage only",
        "Use tensor_parallel_size instead",
    ),
)
_WITH_MIXTURES = (
    Refusal(
        "data_parallel_size > 1",
        lambda c: c.parallel_config.data_parallel_size > 1,
        "one replica's scaling pass would be a forward pass that the others don't run",
        "Start several servers",
    ),
    Refusal(
        "context parallelism",
        lambda c: c.parallel_config.prefill_context_parallel_size * c.parallel_config.decode_context_parallel_size > 1,
        "a rank then has some tokens only",
        "Use tensor_parallel_size instead",
        with_routers=True,
    ),
    Refusal(
        "a KV connector (kv_transfer_config)",
        lambda c: c.kv_transfer_config is not None,
        "it knows nothing of the second cache and would save or load half of the keys and values",
        "Leave it out",
    ),
    Refusal(
        "KV offloading (kv_offloading_size)",
        lambda c: getattr(c.cache_config, "kv_offloading_size", None) is not None,
        "it knows nothing of the second cache",
        "Leave it out",
    ),
    Refusal(
        "an encoder cache connector (ec_transfer_config)",
        lambda c: c.ec_transfer_config is not None,
        "models that read more than text were not tested",
        "Leave it out",
    ),
    Refusal(
        "speculative decoding",
        lambda c: c.speculative_config is not None,
        "drafts are checked by a forward pass whose gates were not tested",
        "Leave speculative_config out",
        with_routers=True,
    ),
    Refusal(
        "a model that isn't a plain causal decoder",
        lambda c: (
            c.model_config.is_hybrid
            or c.model_config.is_attention_free
            or c.model_config.is_encoder_decoder
            or c.model_config.is_multimodal_model
        ),
        "state-space, hybrid, encoder-decoder and multimodal models were not tested",
        "Serve it without mixtures",
        with_routers=True,
    ),
    Refusal(
        "microbatches (enable_dbo, ubatch_size)",
        lambda c: c.parallel_config.use_ubatching,
        "the scaling pass and the gates take a batch as one",
        "Leave them out",
        with_routers=True,
    ),
    Refusal(
        "asynchronous scheduling",
        lambda c: c.scheduler_config.async_scheduling,
        "it was not tested",
        "Set async_scheduling=False (--no-async-scheduling)",
        with_routers=True,
    ),
    Refusal(
        "a quantized KV cache",
        lambda c: c.cache_config.cache_dtype not in ("auto", "float16", "bfloat16"),
        "the second cache would share the first one's scales",
        "Set kv_cache_dtype='auto'",
    ),
    Refusal(
        "sleep mode",
        lambda c: c.model_config.enable_sleep_mode,
        "level 2 throws away the gates' buffers",
        "Leave enable_sleep_mode out",
        with_routers=True,
    ),
    Refusal(
        "compilation mode STOCK_TORCH_COMPILE or DYNAMO_TRACE_ONCE",
        lambda c: c.compilation_config.mode in (CompilationMode.STOCK_TORCH_COMPILE, CompilationMode.DYNAMO_TRACE_ONCE),
        "the whole model is compiled then, with what gates mixtures inside",
        "Use mode NONE (enforce_eager) or VLLM_COMPILE",
        with_routers=True,
    ),
    Refusal(
        "breakable CUDA graphs",
        lambda c: is_breakable_cudagraph_enabled(),
        "they replay the whole model without calling it",
        "Unset VLLM_USE_BREAKABLE_CUDAGRAPH",
    ),
    Refusal(
        "two CUDA streams for LoRA",
        lambda c: envs.VLLM_LORA_ENABLE_DUAL_STREAM,
        "gates were not tested on the second stream",
        "Unset VLLM_LORA_ENABLE_DUAL_STREAM",
        with_routers=True,
    ),
)
_WITH_RESIDUALS = (
    Refusal(
        "compiled or recorded forward passes",
        lambda c: (
            c.compilation_config.mode != CompilationMode.NONE
            or (not current_platform.is_cpu() and c.compilation_config.cudagraph_mode != CUDAGraphMode.NONE)
        ),
        "residuals are added by hooks, which such passes leave out",
        "Set enforce_eager=True (--enforce-eager)",
    ),
    Refusal(
        "the second model runner",
        lambda c: c.use_v2_model_runner,
        "it keeps requests elsewhere, and residuals were not tested with it",
        "Set VLLM_USE_V2_MODEL_RUNNER=0",
    ),
)
_WITH_ATTENTION = (
    Refusal(
        "another platform than a CPU",
        lambda c: not current_platform.is_cpu(),
        "the memory of its blocks is laid out in another way, in which keys were not kept and read yet",
        "Leave loraplex.attention out",
    ),
)


def check_config(config: VllmConfig, options: PluginOptions) -> None:
    """Raise UnsupportedEngineError, which names the first setting that links or mixtures don't go with."""
    for refusal in _ALWAYS:
        if refusal.is_on(config):
            raise UnsupportedEngineError(f"loraplex inside vLLM refuses {refusal.name}: {refusal.why}. {refusal.fix}.")
    what = options.asked_for
    for refusal in _WITH_MIXTURES:
        has_caches = options.mixtures or options.linked > 0 or options.attention
        applies = has_caches or ((options.routers or options.has_residuals) and refusal.with_routers)
        if applies and refusal.is_on(config):
            raise UnsupportedEngineError(
                f"{what} inside vLLM don't go with {refusal.name}: {refusal.why}. {refusal.fix}, or do without."
            )
    hooks = (*_WITH_RESIDUALS, *(_WITH_ATTENTION if options.attention else ()))
    for refusal in hooks if options.has_residuals or options.attention else ():
        if refusal.is_on(config):
            raise UnsupportedEngineError(
                f"{what} inside vLLM don't go with {refusal.name}: {refusal.why}. {refusal.fix}, or do without."
            )
