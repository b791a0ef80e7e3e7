"""A module whose own weights some adapters change: its output, for each row with the weights of the row's adapters."""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional

from loraplex.adapters.store.module_change import Product
from loraplex.errors import BatchError
from loraplex.kernels.float_product import float_product
from loraplex.kernels.native import gated_linear_native
from loraplex.kernels.packed_weight import no_adapters
from loraplex.kernels.tuning import ALL_TOKENS
from loraplex.layers.lora_layer import plan_for
from loraplex.layers.row_order import RowOrder
from loraplex.routing.plan import RoutingPlan
from loraplex.routing.routing import current_routing


class ChangedOutput:
    """A forward hook behind those of the LoRA layers, which may want the base's output."""

    def __init__(self, path: str, order: Callable[[], RowOrder], *, is_embedding: bool) -> None:
        self.path = path
        self._order = order
        self._is_embedding = is_embedding

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor | None:
        routing = current_routing()
        if routing is None or not routing.changes(self.path):
            return None
        x, order = args[0], self._order()
        layout = x.shape if self._is_embedding else x.shape[:-1]
        if not isinstance(y, Tensor) or y.shape[:-1] != layout:
            raise BatchError(
                f"module {self.path!r} answers with something else than one vector for each input, which no adapter "
                "can change. Load the adapter without it."
            )
        if order is not RowOrder.TOKENS:
            plan = plan_for(routing, layout, -1, self.path, order, acts=True)
            return None if plan is None else self._changed(y, x, plan)
        x = x.transpose(0, 1).contiguous()
        plan = plan_for(routing, x.shape if self._is_embedding else x.shape[:-1], -1, self.path, order, acts=True)
        if plan is None:
            return None
        return self._changed(y.transpose(0, 1).contiguous(), x, plan).transpose(0, 1).contiguous()

    def _changed(self, y: Tensor, x: Tensor, plan: RoutingPlan) -> Tensor:
        """y with the changes of the plan's rows; other rows keep their bits."""
        y = y.contiguous()
        flat_y = y.view(-1, y.shape[-1])
        flat_x = x.reshape(-1) if self._is_embedding else x.reshape(-1, x.shape[-1])
        product = _product(plan, flat_x)
        for segment, change in plan.changes_of(self.path):
            part = slice(segment.start, segment.stop)
            change.add(flat_y[part], flat_x[part], plan.gates.of_segment(segment, 0), product)
        return y


def _product(plan: RoutingPlan, x: Tensor) -> Product:
    """Float32 sums; of few tokens in the compiled kernel, where a token has the same bits in any batch."""
    if x.is_floating_point() and plan.decodes_fast(x, ALL_TOKENS):
        return _native_product
    return _torch_product


def _torch_product(x: Tensor, weight: Tensor) -> Tensor:
    return functional.linear(x, weight) if x.dtype.itemsize > 2 else float_product(x, weight, None)


def _native_product(x: Tensor, weight: Tensor) -> Tensor:
    return gated_linear_native(x.contiguous(), weight, None, *no_adapters(), True)
