"""Routers whose weight adapters adapt: every token is sent to experts by its row's weight.

logits[t] = (W + sum_j gate[t, j] * s_j * B_j A_j) x[t]

What a router makes of its logits (scores, groups, the best experts) differs from model to model, so it is left to the
module itself: only its product with the weight is watched for, and gets the adapters' share.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from loraplex.errors import BatchError
from loraplex.kernels.segmented import gated_lora_segmented
from loraplex.layers.lora_layer import add_adapters, plan_for
from loraplex.layers.rows.order import RowOrder
from loraplex.routing.plan import RoutingPlan
from loraplex.routing.routing import current_routing

_CASTS = ("type", "to", "float", "contiguous")  # methods of a tensor that leave its values' meaning


class LoraRouter(nn.Module):
    """What a router becomes while adapters can reach it, together with its own class."""

    lora_index: int
    lora_path: str
    lora_order: RowOrder

    weight: Tensor  # [experts, hidden], of the module's own class

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        routing = current_routing()
        if routing is None or not routing.adapts(self.lora_index):
            return super().forward(*args, **kwargs)
        x = args[0] if args else next(iter(kwargs.values()))
        order = RowOrder.UNKNOWN if self.lora_order is RowOrder.TOKENS else self.lora_order
        plan = plan_for(routing, x.shape[:-1], self.lora_index, self.lora_path, order)
        if plan is None or not plan.adapts(self.lora_index):
            return super().forward(*args, **kwargs)
        with WeightProducts(self.weight, lambda y, x: self._add(y, x, plan)) as products:
            output = super().forward(*args, **kwargs)
        if products.count != 1:
            raise BatchError(
                f"the router {self.lora_path!r} multiplies its weight in another way than when its adapters were "
                "loaded, so that they can't be added. Load the adapters without it."
            )
        return output

    def _add(self, y: Tensor, x: Tensor, plan: RoutingPlan) -> Tensor:
        if x.dtype != self.weight.dtype:  # it computes in float32, whatever the model's dtype is
            return gated_lora_segmented(y, x, plan.lora_segments(self.lora_index, training=plan.bank.trainable))
        return add_adapters(self.lora_index, y, x, plan, bias=None)


class WeightProducts(TorchFunctionMode):
    """Inside the block, the products of one weight [out, in] go through `change`, and are counted."""

    def __init__(self, weight: Tensor, change: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.count = 0
        self._change = change
        self._same = [weight]  # it, and what it was cast to

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is functional.linear and len(args) > 1 and self._is_weight(args[1]):
            self.count += 1
            return self._change(output, args[0])
        if getattr(func, "__name__", "") in _CASTS and args and self._is_weight(args[0]):
            self._same.append(output)
        return output

    def _is_weight(self, value: object) -> bool:
        return any(value is known for known in self._same)


def multiplies_once(module: nn.Module) -> bool:
    """Whether a module of this weight multiplies its input with it once, by `torch.nn.functional.linear`.

    Told by running it on two tokens of zeros.
    """
    weight = module.weight
    assert isinstance(weight, Tensor), "a router without a weight"
    x = torch.zeros(2, weight.shape[1], dtype=weight.dtype, device=weight.device)
    try:
        with torch.no_grad(), WeightProducts(weight, lambda y, x: y) as products:
            module(x)
    except Exception:  # it needs something else than hidden states
        return False
    return products.count == 1


def become_lora_router(module: nn.Module, index: int, path: str, order: RowOrder) -> None:
    """Change the module's class in place, as `become_lora_linear` does."""
    vars(module).update(lora_index=index, lora_path=path, lora_order=order)
    own: Any = type(module)
    module.__class__ = _with_adapters(own)


def become_plain_router(module: nn.Module) -> None:
    """Give the module back as it was."""
    module.__class__ = type(module).__bases__[1]
    del module.lora_index, module.lora_path, module.lora_order


@cache
def _with_adapters(own: type[Any]) -> type[nn.Module]:
    return type(f"Lora{own.__name__}", (LoraRouter, own), {})
