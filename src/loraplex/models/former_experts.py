"""Adapters of single experts, by the names that these had before transformers 5 stacked them, as PEFT converts them."""

from collections.abc import Iterable, Mapping

from torch import nn
from transformers import PreTrainedModel, conversion_mapping
from transformers.pytorch_utils import Conv1D

from loraplex.adapters.config import LoraConfig
from loraplex.adapters.peft.single_experts import (
    SingleExpertNames,
    names_single_experts,
    stacked_adapter,
    stacked_shapes,
)
from loraplex.adapters.weights import Adapter, ModuleShape
from loraplex.errors import UnsupportedAdapterError
from loraplex.layers.base.modules import output_module
from loraplex.validation import listed

# PEFT's `_MOE_TARGET_MODULE_MAPPING` and what transformers renames: gate, up, down, and a part of all paths.
_FAMILIES: Mapping[str, tuple[str, str, str, tuple[str, str] | None]] = {
    "mixtral": ("w1", "w3", "w2", (".block_sparse_moe.", ".mlp.")),
    "qwen2_moe": ("gate_proj", "up_proj", "down_proj", None),
}


def former_experts(base: PreTrainedModel) -> SingleExpertNames | None:
    """The names of single experts that PEFT converts for this base model; None where it converts none."""
    model_type = getattr(base.config, "model_type", None)
    # A table of transformers' own, which PEFT asks too; Mixtral itself is missing there.
    known = {**getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {}), "mixtral": "mixtral"}
    family = _FAMILIES.get(known.get(model_type, ""))
    if family is None:
        return None
    gate, up, down, renamed = family
    output = output_module(base)
    linear = [path for path, module in base.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    return SingleExpertNames(
        gate=gate,
        up=up,
        down=down,
        renamed=renamed,
        linear=tuple(path for path in linear if path != output),
        modules=tuple(path for path, _ in base.named_modules()),
        parameters=frozenset(path for path, _ in base.named_parameters()),
    )


def with_stacked_shapes(
    base: PreTrainedModel, known: Mapping[str, ModuleShape], config: LoraConfig, shapes: Mapping[str, ModuleShape]
) -> tuple[LoraConfig, Mapping[str, ModuleShape]]:
    """Settings and shapes of an adapter, converted where it has single experts that the base model stacks.

    Raises UnsupportedAdapterError where PEFT converts none for this base model.
    """
    former = _former_of(base, known, shapes)
    return (config, shapes) if former is None else stacked_shapes(config, shapes, former)


def with_stacked_experts(base: PreTrainedModel, known: Mapping[str, ModuleShape], adapter: Adapter) -> Adapter:
    """The same of an adapter with its weights; raises the same."""
    former = _former_of(base, known, adapter.layers)
    return adapter if former is None else stacked_adapter(adapter, former)


def _former_of(
    base: PreTrainedModel, known: Mapping[str, ModuleShape], paths: Iterable[str]
) -> SingleExpertNames | None:
    """What single experts were called, if there are some among `paths` and the base model has them stacked."""
    single = [path for path in names_single_experts(tuple(paths)) if path not in known]
    if not single:
        return None
    former = former_experts(base)
    if former is None:
        raise UnsupportedAdapterError(
            f"the adapter has weights for single experts, such as {listed(single)}, which {type(base).__name__} "
            "doesn't have as modules, and PEFT converts none for its model type. Train it again with target_parameters."
        )
    return former
