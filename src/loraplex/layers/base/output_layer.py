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
from loraplex.kernels.packed_weight import PackedWeight, packed_linear
from loraplex.layers.lora_layer import add_adapters, add_tokens_first, plan_for
from loraplex.layers.lora_linear import LoraLinear
from loraplex.layers.rows.order import RowOrder
from loraplex.routing.routing import current_routing

PACKED_COPY = "loraplex_packed_copy"  # on an output layer whose weight is tied

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
            return self._float_product(input)
        if self.lora_order is RowOrder.TOKENS:
            y = self._float_product(input)
            return add_tokens_first(self.lora_index, self.lora_path, y, input, routing, bias=self.bias)
        plan = plan_for(routing, input.shape[:-1], self.lora_index, self.lora_path, self.lora_order)
        if plan is not None and plan.decodes_fast(input, self.lora_max_compiled):
            return self.decode(input.contiguous(), plan, float_sums=True)
        y = self._float_product(input)
        if plan is None or not plan.adapts(self.lora_index):
            return y
        return add_adapters(self.lora_index, y, input, plan, bias=self.bias)

    @property
    def decoding_weight(self) -> Tensor:
        """A packed copy where the weight is the embedding's too, which reads single rows."""
        copy: Tensor | None = vars(self).get(PACKED_COPY)
        return self.weight if copy is None else copy

    def _float_product(self, x: Tensor) -> Tensor:
        weight = self.decoding_weight
        if isinstance(weight, PackedWeight):
            return packed_linear(x, weight, self.bias, float_sums=True)
        return float_product(x, weight, self.bias)


def rounds_logits(module: nn.Module) -> bool:
    """Whether a linear module's outputs have 16 bits."""
    return module.weight.dtype in (torch.bfloat16, torch.float16)
