"""A batch's routing while a linear router trains: all experts on all tokens, gated by what each layer reads."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from loraplex.adapters.store.slot_weights import SlotWeights
from loraplex.kernels.segments import LoraSegment
from loraplex.routers.router import LinearRouter
from loraplex.routing.plan import RoutingPlan
from loraplex.routing.rows import RowRouting
from loraplex.routing.segments import RoutedGate, Segment
from loraplex.routing.weight_provider import WeightProvider
from loraplex.training.mixture.routing import Experts


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


class RouterPlan(RoutingPlan):
    """One segment of the stacked experts, with a gate for each rank row, predicted when its layer runs."""

    def __init__(
        self,
        experts: Experts,
        router: LinearRouter,
        num_tokens: int,
        positions: Tensor | None,
        listener: GatingListener,
        bank: WeightProvider | None,
    ) -> None:
        gates = [RoutedGate(router, expert, 1.0) for expert in range(experts.num_experts)]
        segments = [Segment(0, num_tokens, expert, gate) for expert, gate in enumerate(gates)]
        super().__init__(segments, num_tokens, bank or experts.bank)
        self._experts = experts
        self._router = router
        self._positions = positions
        self._listener = listener
        self._is_stacked = bank is None  # dropout draws for each expert
        self._values: dict[int, Tensor] = {}  # [tokens, experts], by module, until they are used

    def route(self, module: int, x: Tensor) -> None:
        flat = x.reshape(-1, x.shape[-1])
        experts = [layers.get(module) for layers in self._experts.slots]
        logits = self._router.logits(module, flat, experts)
        gates = self._values[module] = self._router.gates_of(logits)
        self._listener(LayerGating(module, flat, experts, logits, gates, self._positions))

    def lora_segments(self, module: int, *, training: bool = False) -> list[LoraSegment]:
        gates = self._values.pop(module)
        if self._is_stacked:
            stack = self._experts.stack(module)
            of_ranks = gates.index_select(1, stack.columns) * stack.scalings  # [tokens, total_rank]
            return [LoraSegment(0, self.num_tokens, stack.lora_a, stack.lora_b, of_ranks)]
        return [
            LoraSegment(
                0,
                self.num_tokens,
                weights.lora_a,
                weights.lora_b,
                gates[:, segment.slot] * weights.scaling,
                *self.bank.dropout(segment.slot),
            )
            for segment, weights in self.weights_of(module)
        ]


class RouterTrainingRouting(RowRouting):
    """Plans for two layouts: the padded rows, and the selected positions of all rows that reach lm_head."""

    def __init__(
        self,
        experts: Experts,
        router: LinearRouter,
        num_rows: int,
        padded_length: int,
        selected: Tensor,  # [outputs]  positions among the padded rows' tokens
        listener: GatingListener,
        *,
        bank: WeightProvider | None = None,  # None: that of the experts, without dropout
    ) -> None:
        super().__init__([[] for _ in range(num_rows)], experts.bank)
        self._experts = experts
        self._router = router
        self._padded_length = padded_length
        self._selected = selected
        self._listener = listener
        self._dropout_bank = bank

    @property
    def is_uniform(self) -> bool:
        return False

    def adapts(self, module: int) -> bool:
        return any(module in layers for layers in self._experts.slots)

    def takes(self, num_sequences: int) -> bool:
        return True  # its two layouts are known

    def _build(self, num_sequences: int, length: int) -> RoutingPlan:
        positions = None
        if (num_sequences, length) != (self.num_rows, self._padded_length):
            positions = self._selected
            assert (num_sequences, length) == (1, len(positions)), (
                f"a layer got {num_sequences} sequences of {length} tokens in a batch of {self.num_rows} rows padded "
                f"to {self._padded_length} tokens"
            )
        num_tokens = num_sequences * length
        return RouterPlan(self._experts, self._router, num_tokens, positions, self._listener, self._dropout_bank)
