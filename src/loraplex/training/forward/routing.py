"""The routing of a training batch: each row to its job's slot."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from loraplex.adapters.store.slot_weights import SlotWeights
from loraplex.routing.plan import RoutingPlan
from loraplex.routing.rows import Route, RowRouting
from loraplex.routing.segments import Segment
from loraplex.routing.weight_provider import WeightProvider


class FrozenSlot(NamedTuple):
    """An adapter that isn't in training, with its weight in the link."""

    slot: int
    weight: float


class RowSpan(NamedTuple):
    """The tokens of one row that go through its slot.

    Without dropout a span takes in the padding after it, whose gradients are zero, so that neighbours join.
    """

    slot: int
    start: int = 0  # aLoRA: where the invocation starts
    stop: int | None = None  # dropout draws for tokens, not for padding; None is the end of the padded row
    outputs: Sequence[int] = ()  # ascending positions whose logits are wanted
    frozen: Sequence[FrozenSlot] = ()  # what all tokens of the row go through besides


class TrainingRouting(RowRouting):
    """Plans for two layouts: the padded rows, and the selected positions of all rows that reach lm_head."""

    def __init__(self, spans: Sequence[RowSpan], padded_length: int, bank: WeightProvider) -> None:
        super().__init__([_routes(span) for span in spans], bank)
        self._spans = spans
        self._padded_length = padded_length

    @property
    def is_uniform(self) -> bool:
        return False

    def takes(self, num_sequences: int) -> bool:
        return True  # its two layouts are known

    def _build(self, num_sequences: int, length: int) -> RoutingPlan:
        if (num_sequences, length) == (len(self._spans), self._padded_length):
            segments = self._padded_segments()
        else:
            segments = self._selected_segments()
            assert (num_sequences, length) == (1, sum(len(span.outputs) for span in self._spans)), (
                f"a layer got {num_sequences} sequences of {length} tokens in a batch of {len(self._spans)} "
                f"rows padded to {self._padded_length} tokens"
            )
        return RoutingPlan(segments, num_sequences * length, self.bank)

    def _padded_segments(self) -> list[Segment]:
        length = self._padded_length
        return [
            Segment(
                row * length + span.start,
                row * length + (length if span.stop is None else span.stop),
                span.slot,
            )
            for row, span in enumerate(self._spans)
        ] + [
            Segment(row * length, (row + 1) * length, frozen.slot, frozen.weight)
            for row, span in enumerate(self._spans)
            for frozen in span.frozen
        ]

    def _selected_segments(self) -> list[Segment]:
        segments, first = [], 0
        for span in self._spans:
            stop = first + len(span.outputs)
            inactive = sum(position < span.start for position in span.outputs)
            segments.append(Segment(first + inactive, stop, span.slot))
            segments += [Segment(first, stop, frozen.slot, frozen.weight) for frozen in span.frozen]
            first = stop
        return segments


def _routes(span: RowSpan) -> list[Route]:
    return [Route(slot=span.slot), *(Route(slot=frozen.slot, weight=frozen.weight) for frozen in span.frozen)]


class TrainingSlot(NamedTuple):
    """One adapter in training; rows with dropout each have a slot, whose generator no other row draws from."""

    layers: Mapping[int, SlotWeights]  # by module index; factors are float32 parameters
    dropout: float = 0.0
    generator: torch.Generator | None = None


class TrainingWeightProvider:
    """The slots of one forward pass, as a routing plan wants them (routing/weight_provider.py)."""

    trainable = True

    def __init__(self, slots: Sequence[TrainingSlot]) -> None:
        self._slots = slots

    def layers(self, slot: int) -> Mapping[int, SlotWeights]:
        return self._slots[slot].layers

    def dora_scaled(self, slot: int) -> frozenset[int]:
        return frozenset(index for index, weights in self._slots[slot].layers.items() if weights.dora_scale is not None)

    def dropout(self, slot: int) -> tuple[float, torch.Generator | None]:
        return self._slots[slot].dropout, self._slots[slot].generator

    def max_rank(self, slot: int) -> int:
        return max((weights.lora_a.shape[0] for weights in self._slots[slot].layers.values()), default=0)

    def native_table(self) -> tuple[Tensor, Tensor] | None:
        return None
