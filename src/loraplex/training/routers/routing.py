"""A batch's routing while a linear router trains: all experts on all tokens, gated by what each layer reads."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from loraplex.adapters.store.slot_weights import SlotWeights
from loraplex.routers.router import LinearRouter
from loraplex.routing.segments import RoutedGate, Segment
from loraplex.routing.weight_provider import WeightProvider
from loraplex.training.mixture.routing import Experts, ExpertsPlan, ExpertsRouting


class LayerGating(NamedTuple):
    """What the router makes of one LoRA layer's input."""

    module: int
    x: Tensor  # [tokens, in]
    experts: Sequence[SlotWeights | None]  # None: doesn't adapt the module
    logits: Tensor  # [tokens, experts]  -inf where an expert doesn't adapt the module
    gates: Tensor  # [tokens, experts]
    positions: Tensor | None  # [tokens]  among the padded rows' tokens; None: all of them


class GatingListener(Protocol):
    """What wants to know every layer's gates while a pass runs."""

    def __call__(self, gating: LayerGating) -> None: ...


class RouterPlan(ExpertsPlan):
    """Gates that a router predicts when their layer runs."""

    def __init__(
        self,
        experts: Experts,
        router: LinearRouter,
        num_tokens: int,
        positions: Tensor | None,
        listener: GatingListener,
        bank: WeightProvider | None,
    ) -> None:
        gates = (RoutedGate(router, expert, 1.0) for expert in range(experts.num_experts))
        segments = [Segment(0, num_tokens, expert, gate) for expert, gate in enumerate(gates)]
        super().__init__(experts, segments, num_tokens, bank)
        self._router = router
        self._positions = positions
        self._listener = listener
        self._values: dict[int, Tensor] = {}  # [tokens, experts], by module, until they are used

    def route(self, module: int, x: Tensor) -> None:
        flat = x.reshape(-1, x.shape[-1])
        experts = [layers.get(module) for layers in self._experts.slots]
        logits = self._router.logits(module, flat, experts)
        gates = self._values[module] = self._router.gates_of(logits)
        self._listener(LayerGating(module, flat, experts, logits, gates, self._positions))

    def expert_gates(self, module: int) -> Tensor:  # [tokens, experts]
        return self._values.pop(module)


def router_routing(
    experts: Experts,
    router: LinearRouter,
    num_rows: int,
    padded_length: int,
    selected: Tensor,  # [outputs]  positions among the padded rows' tokens
    listener: GatingListener,
    *,
    bank: WeightProvider | None = None,  # with dropout; None: that of the experts
) -> ExpertsRouting:
    """The routing of rows whose gates a router predicts."""

    def make_plan(num_tokens: int, positions: Tensor | None) -> RouterPlan:
        return RouterPlan(experts, router, num_tokens, positions, listener, bank)

    return ExpertsRouting(experts, num_rows, padded_length, selected, make_plan)
