"""The fastest product for every linear module of a base model: of a packed weight, or torch's for many tokens."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from loraplex.kernels.int8_weight import Int8Weight
from loraplex.kernels.native import SUPPORTED_DTYPES
from loraplex.kernels.packed_experts import can_be_packed_experts, pack_experts, unpack_experts
from loraplex.kernels.packed_weight import PackedWeight, can_be_packed, pack, unpack
from loraplex.kernels.product_times import LinearShape
from loraplex.kernels.tuning import ALL_TOKENS, ProductChoice, choices, unpacked_limit
from loraplex.large_memory import LargeMemory
from loraplex.layers.base.output_layer import PACKED_COPY, LoraOutput
from loraplex.layers.base.parameters import has_stacked_experts, parameter_names
from loraplex.layers.lora_linear import LoraLinear
from loraplex.layers.quantized.kinds import quantized_kind

_MAX_COMPILED = "lora_max_compiled"


class LinearProducts:
    """What was chosen for the linear modules and experts of one base model."""

    @torch.inference_mode(False)  # what weights are moved to must be readable for training
    @torch.no_grad()
    def __init__(self, base: nn.Module) -> None:
        """Measures the products of shapes that this machine hasn't met yet."""
        linear = [module for module in base.modules() if isinstance(module, LoraLinear)]
        self._modules = [module for module in linear if not holds_int8(module)]
        self._experts = [module for module in base.modules() if _has_readable_experts(module)]
        shapes = [shape_of(module) for module in self._modules]
        chosen = choices(shapes + [shape for module in self._experts for shape in expert_shapes(module)])
        owners = Counter(id(parameter) for module in base.modules() for parameter in module._parameters.values())
        memory = LargeMemory()
        try:
            for module in self._modules:
                _use(module, chosen[shape_of(module)], memory, is_tied=owners[id(module.weight)] > 1)
            for experts in self._experts:
                _use_experts(experts, chosen, owners)
        except BaseException:  # there is no memory for the next one
            self.release()
            raise

    def release(self) -> None:
        """Give the modules their weights back."""
        for module in self._modules:
            unpack(module)
            vars(module).pop(PACKED_COPY, None)
            vars(module).pop(_MAX_COMPILED, None)
        for experts in self._experts:
            unpack_experts(experts)
            vars(experts).pop(_MAX_COMPILED, None)
        self._modules, self._experts = [], []


def holds_int8(module: LoraLinear) -> bool:
    """Whether a module's products have 8-bit weights, which only the compiled kernel computes."""
    return isinstance(module.weight, Int8Weight) or isinstance(vars(module).get(PACKED_COPY), Int8Weight)


def shape_of(module: nn.Linear) -> LinearShape:
    """Of a module's weight."""
    return LinearShape(module.out_features, module.in_features, module.weight.dtype)


def expert_shapes(module: Any) -> list[LinearShape]:
    """Of one expert's weights."""
    shapes = []
    for name in parameter_names(module):
        weight = getattr(module, name)
        _, num_out, num_in = weight.transpose(1, 2).shape if module.is_transposed else weight.shape
        shapes.append(LinearShape(num_out, num_in, weight.dtype))
    return shapes


def linear_shapes(base: nn.Module) -> list[LinearShape]:
    """Of all linear modules in their order; a quantized one's has the dtype of integers."""
    shapes = []
    for module in base.modules():
        if quantized_kind(module) is not None:
            dtype = getattr(module.weight, "dtype", torch.int8) if hasattr(module, "weight") else torch.int8
            dtype = torch.int8 if dtype.is_floating_point else dtype
            shapes.append(LinearShape(module.out_features, module.in_features, dtype))  # type: ignore[arg-type]
        elif isinstance(module, nn.Linear):
            shapes.append(shape_of(module))
        elif _has_readable_experts(module):
            shapes += expert_shapes(module)
    return shapes


def _has_readable_experts(module: nn.Module) -> bool:
    """Whether it has stacked experts that the compiled layers may read."""
    if not has_stacked_experts(module):
        return False
    weights = [getattr(module, name, None) for name in parameter_names(module)]
    return all(
        isinstance(weight, nn.Parameter) and weight.ndim == 3 and weight.dtype in SUPPORTED_DTYPES for weight in weights
    )


def _use_experts(module: Any, chosen: Mapping[LinearShape, ProductChoice], owners: Mapping[int, int]) -> None:
    """Pack experts where that is the fastest for both of their weights; else tell up to how many tokens of one expert
    the compiled product is."""
    names, shapes = parameter_names(module), expert_shapes(module)
    weights = [getattr(module, name) for name in names]
    may_be_packed = not module.is_transposed and all(
        can_be_packed_experts(weight) and owners[id(weight)] == 1 for weight in weights
    )
    if may_be_packed and all(chosen[shape].is_packed for shape in shapes):
        pack_experts(module, names)
    else:
        vars(module)[_MAX_COMPILED] = min(unpacked_limit(shape) for shape in shapes)


def _use(module: LoraLinear, choice: ProductChoice, memory: LargeMemory, *, is_tied: bool) -> None:
    is_output = isinstance(module, LoraOutput)
    if not choice.is_packed or not can_be_packed(module):
        # An output layer's sums stay in float32, which no product of torch's does for 16 bits.
        vars(module)[_MAX_COMPILED] = ALL_TOKENS if is_output else choice.max_compiled_tokens
        memory.move(module.weight)
    elif not is_tied:
        pack(module, memory)
    elif is_output:
        copy = PackedWeight.of(module.weight)
        copy.packed = memory.keep(copy.packed)
        vars(module)[PACKED_COPY] = copy
