"""A module whose own weights some adapters change: its output, for each row with the weights of the row's adapters."""

import math
import threading

import torch
from torch import Tensor, nn
from torch.nn import functional

from loraplex.adapters.store.module_change import Product
from loraplex.errors import BatchError
from loraplex.kernels.float_product import float_product
from loraplex.kernels.native import gated_linear_native
from loraplex.kernels.packed_weight import no_adapters
from loraplex.kernels.tuning import ALL_TOKENS
from loraplex.layers.lora_layer import plan_for
from loraplex.layers.rows.order import RowOrder
from loraplex.routing.plan import RoutingPlan
from loraplex.routing.routing import current_routing


class ChangedOutput:
    """A forward hook behind those of the LoRA layers, which may want the base's output."""

    def __init__(self, path: str, order: RowOrder) -> None:
        self.path = path
        self._order = order

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor | None:
        routing = current_routing()
        if routing is None or not routing.changes(self.path):
            return None
        x, is_tokens_first = args[0], self._order is RowOrder.TOKENS
        if not isinstance(y, Tensor) or y.shape[:-1] != x.shape[:-1]:
            raise BatchError(
                f"module {self.path!r} answers with something else than one vector for each input, which no adapter "
                "can change. Load the adapter without it."
            )
        if is_tokens_first:
            x, y = x.transpose(0, 1).contiguous(), y.transpose(0, 1).contiguous()
        plan = plan_for(routing, x.shape[:-1], -1, self.path, self._order, acts=True)
        if plan is None:
            return None
        y = self._changed(y, x, plan)
        return y.transpose(0, 1).contiguous() if is_tokens_first else y

    def _changed(self, y: Tensor, x: Tensor, plan: RoutingPlan) -> Tensor:
        """y with the changes of the plan's rows; other rows keep their bits.

        Where adapters have outputs that the base lacks, y gets as many as the largest; they are -inf for other rows.
        """
        changes = plan.changes_of(self.path)
        size = max((change.size or 0 for _, change in changes), default=0)
        y = functional.pad(y, (0, size - y.shape[-1]), value=-math.inf) if size > y.shape[-1] else y.contiguous()
        flat_y, flat_x = y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
        product = _product(plan, flat_x)
        for segment, change in changes:
            part = slice(segment.start, segment.stop)
            change.add(flat_y[part], flat_x[part], plan.gates.of_segment(segment, 0), product)
        return y


class ChangedEmbedding:
    """The same behind an embedding, and a hook before it: the base is asked only for tokens that it has."""

    def __init__(self, path: str, order: RowOrder) -> None:
        self.path = path
        self._order = order
        self._now = threading.local()

    def __reduce__(self) -> tuple[type, tuple[str, RowOrder]]:
        """A copy of the model has its own, which is in no pass."""
        return ChangedEmbedding, (self.path, self._order)

    def before(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Let token 0 stand for tokens that a row's own adapter adds."""
        self._now.ids = None
        routing = current_routing()
        if routing is None or not routing.changes(self.path):
            return None
        ids, num_tokens = args[0], _num_tokens(module)
        if not bool((ids >= num_tokens).any()):
            return None
        in_rows, plan = self._in_rows(ids)
        if plan is None:
            return None
        flat = in_rows.reshape(-1)
        is_known = torch.zeros_like(flat, dtype=torch.bool)
        for segment, change in plan.changes_of(self.path):
            part = slice(segment.start, segment.stop)
            is_known[part] |= flat[part] < (change.size or num_tokens)
        is_added = self._as_given((is_known & (flat >= num_tokens)).view(in_rows.shape))
        self._now.ids = ids
        return (ids.masked_fill(is_added, 0), *args[1:])

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor | None:
        routing = current_routing()
        if routing is None or not routing.changes(self.path):
            return None
        given = getattr(self._now, "ids", None)
        ids = args[0] if given is None else given
        in_rows, plan = self._in_rows(ids)
        if plan is None:
            return None
        y = self._as_given(y.masked_fill((ids >= _num_tokens(module)).unsqueeze(-1), 0)).contiguous()
        flat_y, flat_ids = y.view(-1, y.shape[-1]), in_rows.reshape(-1)
        for segment, change in plan.changes_of(self.path):
            part = slice(segment.start, segment.stop)
            change.add(flat_y[part], flat_ids[part], plan.gates.of_segment(segment, 0), _torch_product)
        return self._as_given(y)

    def _in_rows(self, ids: Tensor) -> tuple[Tensor, RoutingPlan | None]:
        """The ids row after row, and the plan for them."""
        routing = current_routing()
        assert routing is not None, "there is no pass"
        ids = self._as_given(ids).contiguous()
        return ids, plan_for(routing, ids.shape, -1, self.path, self._order, acts=True)

    def _as_given(self, tensor: Tensor) -> Tensor:
        """From the module's order of rows and tokens to row after row, and back."""
        return tensor.transpose(0, 1) if self._order is RowOrder.TOKENS else tensor


def _num_tokens(module: nn.Module) -> int:
    assert isinstance(module, nn.Embedding), f"{type(module).__name__} is no embedding"
    return module.num_embeddings


def _product(plan: RoutingPlan, x: Tensor) -> Product:
    """Float32 sums; of few tokens in the compiled kernel, where a token has the same bits in any batch."""
    if plan.decodes_fast(x, ALL_TOKENS):
        return _native_product
    return _torch_product


def _torch_product(x: Tensor, weight: Tensor) -> Tensor:
    return functional.linear(x, weight) if x.dtype.itemsize > 2 else float_product(x, weight, None)


def _native_product(x: Tensor, weight: Tensor) -> Tensor:
    return gated_linear_native(x.contiguous(), weight, None, *no_adapters(), float_sums=True)
