"""Which activation a feed-forward module computes, and whether it is gate_proj, up_proj and down_proj around it."""

from collections.abc import Sequence
from enum import IntEnum
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from loraplex.kernels import native_parts
from loraplex.layers.fusion.agreement import TOLERANCE, agree, holds, random_inputs
from loraplex.layers.quantized.kinds import has_plain_weight


class Activation(IntEnum):
    """Of feed-forward modules."""

    SILU = 0
    GELU = 1
    GELU_TANH = 2
    RELU = 3
    SQUARED_RELU = 4


def activations_in(module: nn.Module) -> Sequence[Activation]:
    """Those that one of a module's parts computes; all, where none does."""
    leaves = [part for part in module.modules() if not list(part.children()) and not list(part.parameters())]
    x = torch.linspace(-8, 8, 4096)
    own = [kind for kind in Activation if any(holds(partial(_computes, leaf, kind, x)) for leaf in leaves)]
    return own or tuple(Activation)


def _computes(module: nn.Module, kind: Activation, x: Tensor) -> bool:
    return torch.allclose(module(x), native_parts.activate(x.clone(), None, kind), rtol=1e-5, atol=1e-5)


# Gated feed-forward modules


def may_be_gated_mlp(module: nn.Module) -> bool:
    names = {name for name, _ in module.named_children()}
    if names - {"act_fn"} != {"gate_proj", "up_proj", "down_proj"}:
        return False
    gate = module.get_submodule("gate_proj")
    return isinstance(gate, nn.Linear) and has_plain_weight(gate) and gate.weight.dtype in TOLERANCE


def activation_of(module: nn.Module) -> Activation | None:
    """The kind that gives what the module gives; None for another formula."""
    return next((kind for kind in activations_in(module) if holds(partial(_is_gated_mlp, module, kind))), None)


def _is_gated_mlp(module: nn.Module, kind: Activation) -> bool:
    gate = module.get_submodule("gate_proj")
    assert isinstance(gate, nn.Linear), "a module without gate_proj was taken for a gated one"
    inputs = random_inputs(3, gate.in_features, like=gate.weight)
    return all(agree(run_gated_mlp(module, x, kind), module(x)) for x in inputs)


def run_gated_mlp(module: nn.Module, x: Tensor, kind: Activation) -> Any:
    return module.down_proj(native_parts.activate(module.gate_proj(x), module.up_proj(x), kind))  # type: ignore[operator]
