"""The LoRA layer: what a base module's output gets from the adapters of each row.

y[t] = W x[t] + B ( g[t] * (A x[t]) )
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from loraplex.errors import BatchError
from loraplex.kernels.native import gated_lora_native
from loraplex.kernels.segmented import gated_lora_embedding, gated_lora_segmented
from loraplex.kernels.stacked import gated_lora_stacked
from loraplex.layers.rows.order import RowOrder
from loraplex.routing.plan import RoutingPlan
from loraplex.routing.routing import Routing, current_routing


class GatedLinear:
    """A forward hook on a linear module: adds each row's gated adapters to the module's output.

    A hook leaves the module, its parameters and their names as they are, so whatever computes W x (a plain,
    quantized or sharded linear) stays in charge of it, and a row without adapters gets exactly that.
    """

    def __init__(self, index: int, path: str, order: RowOrder = RowOrder.ROWS) -> None:
        self.index = index
        self.path = path
        self.order = order

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor | None:
        routing = current_routing()
        if routing is None or not routing.adapts(self.index):
            return None
        x = args[0]
        if not isinstance(y, Tensor) or y.shape[:-1] != x.shape[:-1]:
            raise BatchError(
                f"module {self.path!r} answers with something else than one vector for each input, to which no adapter "
                "can be added. Load the adapter without it."
            )
        bias = getattr(module, "bias", None)
        if self.order is RowOrder.TOKENS:
            return add_tokens_first(self.index, self.path, y, x, routing, bias=bias)
        plan = plan_for(routing, x.shape[:-1], self.index, self.path, self.order)
        if plan is None or not plan.adapts(self.index):
            return None
        return add_adapters(self.index, y, x, plan, bias=bias)


class GatedEmbedding:
    """The same for the input embedding, whose x[t] is the one-hot row of a token's id."""

    def __init__(self, index: int, path: str, order: RowOrder = RowOrder.ROWS) -> None:
        self.index = index
        self.path = path
        self.order = order

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor | None:
        routing = current_routing()
        if routing is None or not routing.adapts(self.index):
            return None
        ids, is_tokens_first = args[0], self.order is RowOrder.TOKENS
        if is_tokens_first:
            ids, y = ids.transpose(0, 1).contiguous(), y.transpose(0, 1).contiguous()
        plan = plan_for(routing, ids.shape, self.index, self.path, self.order)
        if plan is None or not plan.adapts(self.index):
            return None
        dora_scaled = add_dora_scales(self.index, y, y, plan, bias=None)
        y = gated_lora_embedding(dora_scaled, ids, plan.lora_segments(self.index))
        return y.transpose(0, 1).contiguous() if is_tokens_first else y


def add_tokens_first(
    module: int, path: str, y: Tensor, x: Tensor, routing: Routing, *, bias: Tensor | None
) -> Tensor:  # [tokens, rows, ..]
    """Add the adapters for `module` where it sees the rows' tokens beside each other."""
    x = x.transpose(0, 1)
    plan = plan_for(routing, x.shape[:-1], module, path, RowOrder.TOKENS)
    if plan is None or not plan.adapts(module):
        return y
    changed = add_adapters(module, y.transpose(0, 1).contiguous(), x.contiguous(), plan, bias=bias)
    return changed.transpose(0, 1).contiguous()


def add_adapters(module: int, y: Tensor, x: Tensor, plan: RoutingPlan, *, bias: Tensor | None) -> Tensor:
    """Add the plan's adapters for `module` to y [.., out], in place where nothing forbids it.

    Whether adapters train is for their bank to say: the base model is in evaluation mode even then. Adapters in
    training are float32 whatever the base's dtype, which only the segmented kernel takes.
    """
    training = plan.bank.trainable
    needs_grad = gradients_flow(x, y, plan)
    kernel = plan.kernel(x, needs_grad=needs_grad)
    if plan.is_routed and (needs_grad or kernel not in ("native", "triton")):
        plan.route(module, x)
    if plan.has_dora_scale(module):
        y = add_dora_scales(module, y, y.clone(), plan, bias=bias)
    y = y.contiguous()
    if kernel == "triton":
        return add_adapters_together([module], [y], x, plan, needs_grad=needs_grad)[0]
    if kernel == "native":
        return gated_lora_native(y, x.contiguous(), *plan.native_arguments(module))
    if y.dtype != x.dtype:  # an output layer's float32 sums; this kernel takes factors to the dtype of x
        return gated_lora_segmented(y, x.to(y.dtype), plan.lora_segments(module, training=training))
    if kernel == "segmented":
        return gated_lora_segmented(y, x, plan.lora_segments(module, training=training))
    return gated_lora_stacked(y, x, plan.stack(module))


def gradients_flow(x: Tensor, y: Tensor, plan: RoutingPlan) -> bool:
    """Whether the adapters' share needs a kernel with gradients."""
    if plan.bank.trainable:
        return True
    return torch.is_grad_enabled() and (x.requires_grad or y.requires_grad or plan.gates.need_grad)


def add_adapters_together(
    modules: Sequence[int], ys: Sequence[Tensor], x: Tensor, plan: RoutingPlan, *, needs_grad: bool
) -> list[Tensor]:
    """Add the plan's adapters for modules that read one x to their ys [.., out], in place, in the Triton kernels."""
    if needs_grad:  # and `plan.route` ran
        from loraplex.kernels.triton.autograd import gated_lora_triton_grad

        segments = [plan.lora_segments(module, training=plan.bank.trainable) for module in modules]
        return gated_lora_triton_grad(ys, x, segments)
    from loraplex.kernels.triton.gated import gated_lora_triton

    flat_ys = [y.view(-1, y.shape[-1]) for y in ys]
    flat_x = x.contiguous().view(-1, x.shape[-1])
    gated_lora_triton(flat_ys, flat_x, plan.factors, modules, plan.work, plan.gates.all(), plan.routes)
    return list(ys)


def add_dora_scales(module: int, y: Tensor, base_y: Tensor, plan: RoutingPlan, *, bias: Tensor | None) -> Tensor:
    """Add DoRA's share of the base output: gate * (c - 1) * (base_y - bias), for every token of a DoRA adapter."""
    if not plan.has_dora_scale(module):
        return y
    base = base_y.reshape(-1, y.shape[-1]).float()
    total = y.reshape(-1, y.shape[-1]).clone()
    for segment, weights in plan.weights_of(module):
        if weights.dora_scale is None:
            continue
        part = base[segment.start : segment.stop]
        part = part if bias is None else part - bias.float()
        gate = plan.gates.of_segment(segment, module)
        gate = gate.unsqueeze(-1) if isinstance(gate, Tensor) else gate
        total[segment.start : segment.stop].add_((part * weights.dora_scale * gate).to(y.dtype))
    return total.view_as(y)


def plan_for(
    routing: Routing, layout: torch.Size, module: int, path: str, order: RowOrder, *, acts: bool | None = None
) -> RoutingPlan | None:
    """The plan for what a module sees: [sequences, tokens] or flattened tokens, equally many for each row.

    `acts`: whether a row's adapters do something there; None: if they adapt the module. None where the layout is
    another and no row's do. Raises BatchError where the layout doesn't tell
    which tokens are whose and that makes a difference.
    """
    if layout.numel() == 0:
        return None
    if order is not RowOrder.UNKNOWN:
        num_sequences = layout[0] if len(layout) > 1 else math.gcd(layout.numel(), routing.num_rows)
        if routing.takes(num_sequences):
            return routing.plan_for(num_sequences, layout.numel() // num_sequences)
    if not (routing.adapts(module) if acts is None else acts):
        return None
    if routing.is_uniform:
        return routing.uniform_plan(layout.numel())
    raise BatchError(
        f"module {path!r} got a tensor [{', '.join(str(size) for size in layout)}, features] for {routing.num_rows} "
        "rows with different adapters, and which of it belongs to which row can't be told (images, or tokens that an "
        "expert was chosen for, for example). Run rows with different adapters in calls of their own, or use adapters "
        "without this module."
    )
