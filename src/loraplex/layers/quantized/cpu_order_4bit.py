"""4-bit weights of bitsandbytes in the order that its AVX512 kernel reads, and how they were before.

A module brings its weight into that order at its first call without gradients: here at once, as two threads in their
first call would do it twice. The kernel rounds inputs and scales to bfloat16, and no gradient flows through it.
bitsandbytes' own way back leaves the scales rounded, and some in the wrong places, so that the first state is kept.
"""

import copy
from typing import Any

import torch
from torch import Tensor

_FIRST_STATE = "loraplex_first_state"
_ALLOWS = "support_avx512bf16_for_cpu"  # on a module: whether the kernel is there


def is_in_cpu_order(module: Any) -> bool:
    """Whether a 4-bit module's weight is in the kernel's order."""
    return bool(getattr(module.weight.quant_state, "packing_format_for_cpu", False))


@torch.no_grad()
@torch.inference_mode(False)
def bring_into_cpu_order(module: Any) -> bool:
    """Let a 4-bit module order its weight, where it would, and remember how it was. Whether that was done.

    A weight that the kernel can't take, of an odd shape, stays as it is, and is multiplied in the other way.
    """
    weight = module.weight
    would = getattr(module, _ALLOWS, False) and weight.device.type == "cpu" and not module.training
    if weight.quant_state is None or not would or is_in_cpu_order(module):
        return False
    first = copy.copy(weight.quant_state)  # bitsandbytes replaces what a state has, and changes none of it
    try:
        type(module).forward(module, torch.zeros(1, module.in_features))
    except (AssertionError, RuntimeError):
        weight.quant_state = module.quant_state = first
        setattr(module, _ALLOWS, False)
        return False
    vars(module)[_FIRST_STATE] = first
    return True


def first_weight(module: Any) -> tuple[Tensor, Any]:
    """The values and state of a 4-bit module as they were loaded; with rounded scales if nobody kept the state."""
    values, state = module.weight.data, module.weight.quant_state
    if not is_in_cpu_order(module):
        return values, state
    from bitsandbytes import functional

    ordered, first = copy.copy(state), vars(module).get(_FIRST_STATE)
    values, _ = functional._convert_weight_packed_for_cpu_inverse(values, ordered)
    if first is None:
        first = copy.copy(state)
        first.absmax, first.nested = state.absmax.t().reshape(-1).float(), False
        first.dtype, first.packing_format_for_cpu = state.original_dtype, False
    return values, copy.copy(first)


@torch.no_grad()
def restore_first_weight(module: Any) -> None:
    """Put a 4-bit module's weight back into the order that it was loaded in."""
    if is_in_cpu_order(module):
        module.weight.data, module.weight.quant_state = first_weight(module)
        module.quant_state = module.weight.quant_state
