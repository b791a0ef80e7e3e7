"""Runs of a pass's tokens that go through one slot."""

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, NamedTuple

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


def join_neighbours(segments: Sequence[Segment]) -> list[Segment]:
    """Let segments of one slot and gate that follow each other be one: fewer and larger matrix products."""
    joined: list[Segment] = []
    for segment in segments:
        last = joined[-1] if joined else None
        if (
            last is not None
            and (last.stop, last.slot) == (segment.start, segment.slot)
            and isinstance(last.gate, float)
            and isinstance(segment.gate, float)
            and last.gate == segment.gate
        ):
            joined[-1] = last._replace(stop=segment.stop)
        else:
            joined.append(segment)
    return joined
