"""Runs of a pass's tokens that go through one slot."""

from collections.abc import Hashable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from loraplex.routing.layer_gates import GateColumn

if TYPE_CHECKING:
    from loraplex.routing.token_router import TokenRouter


class RoutedGate(NamedTuple):
    """The gate of a segment of one expert: what the router predicts for it, times the weight in the row's link."""

    router: "TokenRouter"
    expert: int  # its place in the mixture
    weight: float
    record: Hashable | None = None  # under what its gates are kept; None: nobody wants to know them


class Segment(NamedTuple):
    """The tokens [start, stop) go through `slot` with one gate, or a gate for each token."""

    start: int
    stop: int
    slot: int
    # Or [stop - start], float32; or what a mixture predicts for an expert: before the pass, or in each layer.
    gate: float | Tensor | GateColumn | RoutedGate = 1.0


def join_for_training(segments: Sequence[Segment], device: torch.device) -> list[Segment]:
    """Let the segments of one slot be few, in which every token has its own gate: larger and fewer matrix products.

    Tokens between two segments get the gate 0, where they are no more than those of the second. `device`: of gates
    that are joined.
    """
    joined: list[list[Segment]] = []
    by_slot: dict[int, list[Segment]] = {}  # the last of each slot, which more may join
    for segment in segments:
        last = by_slot.get(segment.slot)
        if last is None or not _is_joined(last[-1], segment):
            last = by_slot[segment.slot] = []
            joined.append(last)
        last.append(segment)
    return [_joined(parts, device) for parts in joined]


def _is_joined(last: Segment, segment: Segment) -> bool:
    gap = segment.start - last.stop
    are_numbers = isinstance(last.gate, float | int) and isinstance(segment.gate, float | int)
    return are_numbers and 0 <= gap <= segment.stop - segment.start


def _joined(parts: Sequence[Segment], device: torch.device) -> Segment:
    first, last = parts[0], parts[-1]
    gates = {part.gate for part in parts if isinstance(part.gate, float | int)}
    if len(parts) == 1 or (len(gates) == 1 and all(a.stop == b.start for a, b in pairwise(parts))):
        return first._replace(stop=last.stop)
    gate = torch.zeros(last.stop - first.start)
    for part in parts:
        assert isinstance(part.gate, float | int), "only numbers are joined"
        gate[part.start - first.start : part.stop - first.start] = part.gate
    return first._replace(stop=last.stop, gate=gate.to(device))
