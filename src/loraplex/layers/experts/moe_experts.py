"""Feed-forward experts whose stacked weights adapters adapt: each token has its row's adapters in each of its experts.

y[t] = sum_e p[t, e] * f(x[t]; W_e + sum_j gate[t, j] * s_j * B_je A_je)   over the top-k experts e of the token

The base products are those of transformers' experts interface (`experts_implementation`), the adapters' shares are
added to them before what follows (activation, routing weights), and nothing of the size of W_e is formed.
"""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.integrations.moe import _batched_linear, _grouped_linear

from loraplex.errors import UnsupportedAdapterError
from loraplex.kernels.native import gated_lora_native
from loraplex.kernels.segmented import gated_lora_segmented
from loraplex.layers.base.parameters import parameter_names
from loraplex.layers.experts.expert_pairs import ExpertPairs
from loraplex.layers.lora_layer import gradients_flow, plan_for
from loraplex.layers.rows.order import RowOrder
from loraplex.routing.plan import RoutingPlan
from loraplex.routing.routing import current_routing


class LoraExperts(nn.Module):
    """What an experts module becomes while adapters can reach it, together with its own class.

    Without a routing scope, or where no row adapts it, it is the module that it was.
    """

    lora_indices: Mapping[str, int]  # by parameter name
    lora_path: str
    lora_order: RowOrder

    # of the module's own class
    config: Any
    has_gate: bool
    has_bias: bool
    has_post_expert_norm: bool
    is_transposed: bool
    act_fn: Callable[[Tensor], Tensor]
    post_expert_norm: Callable[[Tensor], Tensor]
    _apply_gate: Callable[[Tensor], Tensor]

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        plan = self._plan(hidden_states)
        if plan is None:
            output: Tensor = super().forward(hidden_states, *args, **kwargs)
            return output
        chosen, weights = (*args, *kwargs.values())
        return run_experts(self, hidden_states, chosen, weights, plan)

    def _plan(self, x: Tensor) -> RoutingPlan | None:
        routing, indices = current_routing(), self.lora_indices.values()
        if routing is None or not any(map(routing.adapts, indices)):
            return None
        order = self.lora_order if x.ndim == 2 else RowOrder.UNKNOWN
        adapted = next(filter(routing.adapts, indices))
        plan = plan_for(routing, x.shape[:-1], adapted, self.lora_path, order)
        return plan if plan is not None and any(map(plan.adapts, indices)) else None


def run_experts(
    module: LoraExperts,
    x: Tensor,  # [tokens, hidden]
    chosen: Tensor,  # [tokens, top_k]  int64
    weights: Tensor,  # [tokens, top_k]  of the router
    plan: RoutingPlan,
) -> Tensor:  # [tokens, hidden]
    """The layer's output, every token through its experts with its row's adapters."""
    first, last = parameter_names(module)
    adapting = tuple(module.lora_indices.values())
    pairs = ExpertPairs(chosen, getattr(module, first).shape[0], plan.token_groups(adapting, x.device))
    y = _adapted_product(module, first, x[pairs.tokens], pairs, plan)
    y = module._apply_gate(y) if module.has_gate else module.act_fn(y)
    y = _adapted_product(module, last, y, pairs, plan)
    if module.has_post_expert_norm:
        y = module.post_expert_norm(y)
    y = y * weights.reshape(-1)[pairs.order].unsqueeze(1)
    if _implementation(module) == "eager":  # which adds one expert after the other
        return torch.zeros_like(x).index_add_(0, pairs.tokens, y.to(x.dtype))
    return pairs.in_own_order(y).view(*chosen.shape, -1).sum(dim=1).to(x.dtype)


def _adapted_product(module: LoraExperts, name: str, x: Tensor, pairs: ExpertPairs, plan: RoutingPlan) -> Tensor:
    """The product of each pair's input [pairs, in] with its expert's weight, and the share of the pair's adapters."""
    y = _base_product(module, name, x, pairs)
    index = module.lora_indices[name]
    if not plan.adapts(index):
        return y
    x, y = x.contiguous(), y.contiguous()
    table = plan.bank.expert_table()
    needs_grad = gradients_flow(x, y, plan)
    if table is None or needs_grad or plan.kernel(x, needs_grad=False) != "native" or x.dtype != y.dtype:
        return gated_lora_segmented(y, x, pairs.lora_segments(plan, index))
    return gated_lora_native(y, x, *table.of_module(index), 0, pairs.rows(table.width), pairs.gates)


def _base_product(module: LoraExperts, name: str, x: Tensor, pairs: ExpertPairs) -> Tensor:  # [pairs, out]
    """As the implementation that the model is set to computes it."""
    weight = getattr(module, name)
    bias = getattr(module, f"{name}_bias")[pairs.experts] if module.has_bias else None
    match _implementation(module):
        case "eager":
            return _one_by_one(x, weight, bias, pairs, is_transposed=module.is_transposed)
        case "batched_mm":
            product = _batched_linear(x, weight[pairs.experts], bias=bias, is_transposed=module.is_transposed)
        case _:
            product = _grouped_linear(x, weight, pairs.stops, bias=bias, is_transposed=module.is_transposed)
    y: Tensor = product
    return y


def _one_by_one(x: Tensor, weight: Tensor, bias: Tensor | None, pairs: ExpertPairs, *, is_transposed: bool) -> Tensor:
    parts, start = [], 0
    for expert, stop in enumerate(pairs.stops.tolist()):
        if start < stop:
            part = x[start:stop]
            parts.append(part @ weight[expert] if is_transposed else functional.linear(part, weight[expert]))
        start = stop
    y = torch.cat(parts)
    return y if bias is None else y + bias


def _implementation(module: LoraExperts) -> str | None:
    name: str | None = module.config._experts_implementation
    return name


def become_lora_experts(module: nn.Module, path: str, indices: Mapping[str, int], order: RowOrder) -> None:
    """Change the module's class in place, as `become_lora_linear` does; `indices` are those of its parameters.

    Raises UnsupportedAdapterError for experts that are spread over devices.
    """
    if getattr(module, "_is_expert_parallel", False):
        raise UnsupportedAdapterError(
            f"the experts of {path!r} are spread over devices, which adapters of them can't follow. Load the base "
            "model on one device, or leave the experts out of target_parameters."
        )
    vars(module).update(lora_indices=dict(indices), lora_path=path, lora_order=order)
    own: Any = type(module)
    module.__class__ = _with_adapters(own)


def become_plain_experts(module: nn.Module) -> None:
    """Give the module back as it was."""
    module.__class__ = type(module).__bases__[1]
    del module.lora_indices, module.lora_path, module.lora_order


@cache
def _with_adapters(own: type[Any]) -> type[nn.Module]:
    return type(f"Lora{own.__name__}", (LoraExperts, own), {})
