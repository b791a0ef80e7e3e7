"""Which names a base model's experts had before transformers 5 stacked them, where PEFT converts adapters of them."""

from collections.abc import Mapping

from torch import nn
from transformers import PreTrainedModel, conversion_mapping
from transformers.pytorch_utils import Conv1D

from loraplex.adapters.peft.single_experts import SingleExpertNames
from loraplex.layers.base.modules import output_module

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
