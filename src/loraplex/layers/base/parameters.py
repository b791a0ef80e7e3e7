"""Which bare parameters of a transformers model can carry adapters: stacked feed-forward experts, and routers."""

from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from loraplex.adapters.peft.parameters import EXPERT_PARAMETERS, ROUTER_PARAMETER
from loraplex.adapters.weights import ModuleShape

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def adaptable_parameters(base: PreTrainedModel) -> dict[str, ModuleShape]:
    """By path, the parameters that `target_parameters` can name, in registration order."""
    shapes: dict[str, ModuleShape] = {}
    for path, module in base.named_modules():
        if path:
            shapes |= {f"{path}.{name}": shape for name, shape in _parameters_of(module)}
    return shapes


def has_stacked_experts(module: nn.Module) -> bool:
    """Whether it computes feed-forward experts by transformers' experts interface.

    Its decorator `use_experts_implementation` says so: the weights are stacked, and any of its functions can run them.
    """
    return all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed", "_apply_gate"))


def parameter_names(module: nn.Module) -> tuple[str, str]:
    """The stacked weights of experts: what reads the hidden states, and what gives them."""
    return ("gate_up_proj" if module.has_gate else "up_proj"), "down_proj"


def _parameters_of(module: nn.Module) -> Iterator[tuple[str, ModuleShape]]:
    own = {name: p for name, p in module.named_parameters(recurse=False) if p.dtype in _DTYPES}
    if has_stacked_experts(module):
        is_transposed, names = bool(module.is_transposed), parameter_names(module)
        in_order = [name for name in own if name in EXPERT_PARAMETERS]
        if in_order != list(names) or any(own[name].ndim != 3 for name in names):
            return
        for name in names:
            num_experts, first, second = own[name].shape
            num_in, num_out = (first, second) if is_transposed else (second, first)
            if num_experts == 1 and is_transposed:  # of which PEFT adapts the weight the other way round
                continue
            yield (
                name,
                ModuleShape(kind="moe experts", in_features=num_in, out_features=num_out, num_experts=num_experts),
            )
        return
    weight = own.get(ROUTER_PARAMETER)
    if weight is not None and weight.ndim == 2 and not isinstance(module, (nn.Linear, nn.Embedding, Conv1D)):
        yield ROUTER_PARAMETER, ModuleShape(kind="router", in_features=weight.shape[1], out_features=weight.shape[0])
