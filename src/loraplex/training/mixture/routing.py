"""A mixture's experts side by side, two matrix products a LoRA layer whatever their number, and the rows' routing."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from loraplex.adapters.store.slot_weights import SlotWeights
from loraplex.kernels.segments import LoraSegment
from loraplex.routing.layer_gates import GateColumn, LayerGates
from loraplex.routing.plan import RoutingPlan
from loraplex.routing.rows import RowRouting
from loraplex.routing.segments import Segment
from loraplex.routing.weight_provider import WeightProvider
from loraplex.training.forward.batch import TrainingSlot, TrainingWeightProvider


class ExpertStack(NamedTuple):
    """The experts that adapt one module."""

    lora_a: Tensor  # [total_rank, in]
    lora_b: Tensor  # [total_rank, out]
    columns: Tensor  # [total_rank]  the expert of each rank row
    scalings: Tensor  # [total_rank]  its LoRA scaling


class Experts:
    """The weights of a mixture's experts, frozen or in training; slot i is the head's i-th expert."""

    def __init__(self, slots: Sequence[Mapping[int, SlotWeights]], *, frozen: bool) -> None:
        self.slots = slots
        self.frozen = frozen
        self.bank = TrainingWeightProvider([TrainingSlot(layers) for layers in slots])
        self._stacks: dict[int, ExpertStack] = {}

    @property
    def num_experts(self) -> int:
        return len(self.slots)

    def bank_with_dropout(self, probability: float, draw: torch.Generator) -> TrainingWeightProvider:
        """The same slots, each dropping what it reads."""
        return TrainingWeightProvider([TrainingSlot(layers, probability, draw) for layers in self.slots])

    def stack(self, module: int) -> ExpertStack:
        """The experts of one module; made once if they are frozen."""
        known = self._stacks.get(module)
        if known is None:
            known = self._make(module)
            if self.frozen:
                self._stacks[module] = known
        return known

    def _make(self, module: int) -> ExpertStack:
        pairs = [(expert, layers[module]) for expert, layers in enumerate(self.slots) if module in layers]
        ranks = [weights.lora_a.shape[0] for _, weights in pairs]
        device = pairs[0][1].lora_a.device
        rows = torch.tensor(ranks, device=device)
        return ExpertStack(
            lora_a=torch.cat([weights.lora_a for _, weights in pairs]),
            lora_b=torch.cat([weights.lora_b for _, weights in pairs]),
            columns=torch.tensor([expert for expert, _ in pairs], device=device).repeat_interleave(rows),
            scalings=torch.tensor([weights.scaling for _, weights in pairs], device=device).repeat_interleave(rows),
        )


class ExpertsPlan(RoutingPlan, ABC):
    """All experts on all tokens: one segment of the stacked experts, with a gate for each rank row."""

    def __init__(
        self,
        experts: Experts,
        segments: Sequence[Segment],  # one of each expert, in their order
        num_tokens: int,
        bank: WeightProvider | None,  # with dropout, which draws for each expert; None: that of the experts
        layer_gates: LayerGates | None = None,
    ) -> None:
        super().__init__(segments, num_tokens, bank or experts.bank, layer_gates=layer_gates)
        self._experts = experts
        self._is_stacked = bank is None

    @abstractmethod
    def expert_gates(self, module: int) -> Tensor:  # [tokens, experts]
        """The gates of a module that runs now."""

    def lora_segments(self, module: int, *, training: bool = False) -> list[LoraSegment]:
        gates = self.expert_gates(module)
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


class ScaledPlan(ExpertsPlan):
    """Gates that a scaling head predicted before the pass."""

    def __init__(
        self,
        experts: Experts,
        gates: LayerGates,
        num_tokens: int,
        positions: Tensor | None,
        bank: WeightProvider | None = None,
    ) -> None:
        columns = (GateColumn(expert, num_tokens, positions) for expert in range(experts.num_experts))
        segments = [Segment(0, num_tokens, expert, column) for expert, column in enumerate(columns)]
        super().__init__(experts, segments, num_tokens, bank, gates)
        self._layer_gates = gates
        self._positions = positions

    def expert_gates(self, module: int) -> Tensor:  # [tokens, experts]
        values = self._layer_gates.of_module(module)[:, 0]  # [experts, tokens]
        return (values if self._positions is None else values.index_select(1, self._positions)).t()


class ExpertsRouting(RowRouting):
    """Plans for two layouts: the padded rows, and the selected positions of all rows that reach lm_head."""

    def __init__(
        self,
        experts: Experts,
        num_rows: int,
        padded_length: int,
        selected: Tensor,  # [outputs]  positions among the padded rows' tokens
        make_plan: Callable[[int, Tensor | None], ExpertsPlan],  # of so many tokens, at positions; None: all of them
        *,
        layer_gates: LayerGates | None = None,
    ) -> None:
        super().__init__([[] for _ in range(num_rows)], experts.bank, layer_gates=layer_gates)
        self._experts = experts
        self._padded_length = padded_length
        self._selected = selected
        self._make_plan = make_plan

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
        return self._make_plan(num_sequences * length, positions)


def scaled_routing(
    experts: Experts,
    gates: LayerGates,
    num_rows: int,
    padded_length: int,
    selected: Tensor,  # [outputs]
    *,
    bank: WeightProvider | None = None,  # with dropout
) -> ExpertsRouting:
    """The routing of rows whose gates a scaling head predicted."""

    def make_plan(num_tokens: int, positions: Tensor | None) -> ScaledPlan:
        return ScaledPlan(experts, gates, num_tokens, positions, bank)

    return ExpertsRouting(experts, num_rows, padded_length, selected, make_plan, layer_gates=gates)


def no_positions(device: torch.device) -> Tensor:
    """For passes that stop before lm_head."""
    return torch.zeros(0, dtype=torch.int64, device=device)
