"""A linear module of the base model that runs with its adapters, in one call where few tokens are decoded."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

from loraplex.kernels.native import gated_linear_native, gated_lora_native
from loraplex.kernels.tuning import ALL_TOKENS
from loraplex.layers.lora_layer import (
    add_adapters,
    add_adapters_together,
    add_dora_scales,
    add_tokens_first,
    gradients_flow,
    plan_for,
)
from loraplex.layers.quantized.kinds import has_plain_weight
from loraplex.layers.rows.order import RowOrder
from loraplex.layers.shared_input import SharedInputs
from loraplex.routing.plan import RoutingPlan
from loraplex.routing.routing import Routing, current_routing


class LoraLinear(nn.Linear):
    """What an `nn.Linear` becomes while adapters can reach it: the same parameters under the same names.

    Outside of a routing scope it is the module that it was. Inside, the base product is torch's, to the bit, unless
    the routing asks for fast decoding and the module sees one token of each sequence: then the compiled kernel reads
    the base weights and the adapters once for all rows.
    """

    lora_index: int
    lora_path: str
    lora_shared: "SharedInputs[LoraLinear]"
    lora_order: RowOrder
    lora_max_compiled = ALL_TOKENS  # tokens up to which the compiled product is the fastest (kernels/tuning.py)

    def forward(self, input: Tensor) -> Tensor:  # the name that nn.Linear gives it
        routing = current_routing()
        if routing is None:
            return functional.linear(input, self.weight, self.bias)
        if self.lora_order is RowOrder.TOKENS:
            return self._run_tokens_first(input, routing)
        plan = plan_for(routing, input.shape[:-1], self.lora_index, self.lora_path, self.lora_order)
        if plan is None:
            return functional.linear(input, self.weight, self.bias)
        if plan.decodes_fast(input, self.lora_max_compiled) and input.dtype == self.weight.dtype:
            return self.decode(input.contiguous(), plan)
        if plan.launches_together(input) and input.dtype == self.weight.dtype:
            return self.lora_shared.run(self, input, plan, run_together)
        return self.run_alone(input, plan)

    @property
    def decoding_weight(self) -> Tensor:  # [out, in]
        """What the compiled product reads."""
        return self.weight

    def run_alone(self, x: Tensor, plan: RoutingPlan) -> Tensor:
        """The base product, and the adapters behind it."""
        y = functional.linear(x, self.weight, self.bias)
        if not plan.adapts(self.lora_index):
            return y
        return add_adapters(self.lora_index, y, x, plan, bias=self.bias)

    def _run_tokens_first(self, x: Tensor, routing: Routing) -> Tensor:  # [tokens, rows, in]
        """The base product as the model computes it; the adapters see the rows one after the other."""
        y = functional.linear(x, self.weight, self.bias)
        return add_tokens_first(self.lora_index, self.lora_path, y, x, routing, bias=self.bias)

    def decode(self, x: Tensor, plan: RoutingPlan, *, float_sums: bool = False) -> Tensor:
        """Base product and adapters in the compiled kernel; with `float_sums`, in float32 whatever x is."""
        index = self.lora_index
        if not plan.has_dora_scale(index):
            adapters = plan.native_arguments(index)
            return gated_linear_native(x, self.decoding_weight, self.bias, *adapters, float_sums=float_sums)
        # DoRA needs the base output by itself. It is not torch's: the bits of other rows must not tell who is there.
        table, scalings, _, rows, gates, routing = plan.native_arguments(index)
        none = (table, scalings, index, rows[:0], gates)
        y = gated_linear_native(x, self.decoding_weight, self.bias, *none, float_sums=float_sums)
        y = add_dora_scales(index, y, y, plan, bias=self.bias)
        return gated_lora_native(y, x, table, scalings, index, rows, gates, routing)


def run_together(modules: Sequence[LoraLinear], x: Tensor, plan: RoutingPlan) -> list[Tensor]:
    """The outputs of modules that read one x, whose adapters share the launches of the Triton kernels."""
    if len(modules) == 1 or any(plan.has_dora_scale(module.lora_index) for module in modules):
        return [module.run_alone(x, plan) for module in modules]
    ys = [functional.linear(x, module.weight, module.bias) for module in modules]
    needs_grad = gradients_flow(x, ys[0], plan)
    if plan.kernel(x, needs_grad=needs_grad) != "triton" or (plan.is_routed and needs_grad):
        return [module.run_alone(x, plan) for module in modules]
    adapted = [i for i, module in enumerate(modules) if plan.adapts(module.lora_index)]
    if adapted:
        indices, outputs = [modules[i].lora_index for i in adapted], [ys[i] for i in adapted]
        changed = add_adapters_together(indices, outputs, x, plan, needs_grad=needs_grad)
        for i, y in zip(adapted, changed, strict=True):
            ys[i] = y
    return ys


def can_become_lora_linear(module: nn.Module) -> bool:
    """Whether a module is a plain linear one: no subclass of module or weight, no forward of its own (offloading)."""
    if type(module) is not nn.Linear or "forward" in vars(module):
        return False
    return has_plain_weight(module) and module.weight.is_contiguous()


def become_lora_linear(
    module: nn.Module,
    index: int,
    path: str,
    shared: "SharedInputs[LoraLinear] | None" = None,
    order: RowOrder = RowOrder.ROWS,
    *,
    as_class: type[LoraLinear] = LoraLinear,
) -> None:
    """Change the module's class in place: parameters, names, hooks and references to it stay as they are."""
    # First what LoraLinear.forward reads: another thread may be about to run the module.
    vars(module).update(lora_index=index, lora_path=path, lora_shared=shared or SharedInputs(), lora_order=order)
    module.__class__ = as_class


def become_linear(module: nn.Module) -> None:
    """Give a LoraLinear back as the nn.Linear that it was."""
    module.__class__ = nn.Linear
    del module.lora_index, module.lora_path, module.lora_shared, module.lora_order
