"""The output layer, whose logits choose tokens.

Two logits that differ by less than a 16-bit number can tell are equal once they are rounded to one, and then the order
of the vocabulary chooses. So where tokens are chosen, a 16-bit model's output layer keeps its float32 sums, and what
the model does to logits behind it (a scale, a cap) is computed in float32 too.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from loraplex.kernels.float_product import float_product
from loraplex.layers.lora_layer import add_adapters, add_tokens_first, plan_for
from loraplex.layers.lora_linear import LoraLinear
from loraplex.layers.row_order import RowOrder
from loraplex.routing.routing import current_routing

_chooses: ContextVar[bool] = ContextVar("loraplex_chooses_tokens", default=False)


@contextmanager
def choosing_tokens() -> Iterator[None]:
    """Let the output layer give float32 logits inside the block, whatever the model's dtype is."""
    token = _chooses.set(True)
    try:
        yield
    finally:
        _chooses.reset(token)


class LoraOutput(LoraLinear):
    """The output layer as a LoraLinear, with float32 sums while tokens are chosen and no gradients flow."""

    def forward(self, input: Tensor) -> Tensor:  # the name that nn.Linear gives it
        if not _chooses.get() or torch.is_grad_enabled() or not rounds_logits(self) or input.dtype != self.weight.dtype:
            return super().forward(input)
        routing = current_routing()
        if routing is None:
            return float_product(input, self.weight, self.bias)
        if self.lora_order is RowOrder.TOKENS:
            y = float_product(input, self.weight, self.bias)
            return add_tokens_first(self.lora_index, self.lora_path, y, input, routing, bias=self.bias)
        plan = plan_for(routing, input.shape[:-1], self.lora_index, self.lora_path, self.lora_order)
        if plan is not None and plan.decodes_fast(input):
            return self.decode(input.contiguous(), plan, float_sums=True)
        y = float_product(input, self.weight, self.bias)
        if plan is None or not plan.adapts(self.lora_index):
            return y
        return add_adapters(self.lora_index, y, input, plan, bias=self.bias)


def rounds_logits(module: nn.Module) -> bool:
    """Whether a linear module's outputs have 16 bits."""
    return module.weight.dtype in (torch.bfloat16, torch.float16)
