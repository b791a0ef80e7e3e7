"""Which adapters each token of a pass has, for layers that take tokens out of their order: feed-forward experts."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loraplex.routing.layer_gates import GateColumn
from loraplex.routing.segments import RoutedGate, Segment

NO_SLOT = -1


class TokenGroups(NamedTuple):
    """Tokens of one group go through the same slots, each with its own gates."""

    groups: Tensor  # [tokens] int64
    slots: NDArray[np.int64]  # [links, groups]; NO_SLOT: none
    gates: NDArray[np.float32]  # [links, tokens]


def group_tokens(segments: Sequence[Segment], num_tokens: int, device: torch.device) -> TokenGroups:
    """The groups of a plan's tokens; a token's adapters keep the order in which the segments name them."""
    slots = np.full((1, num_tokens), NO_SLOT, dtype=np.int64)
    gates = np.zeros((1, num_tokens), dtype=np.float32)
    for start, stop, slot, gate in segments:
        assert not isinstance(gate, GateColumn | RoutedGate), "stacked experts became a mixture's"
        link = _first_free(slots[:, start:stop])
        if link == len(slots):
            slots = np.concatenate((slots, np.full((1, num_tokens), NO_SLOT, dtype=np.int64)))
            gates = np.concatenate((gates, np.zeros((1, num_tokens), dtype=np.float32)))
        slots[link, start:stop] = slot
        gates[link, start:stop] = gate.float().cpu().numpy() if isinstance(gate, Tensor) else gate
    starts = run_starts(slots)
    numbers: dict[Any, int] = {}
    runs = [numbers.setdefault(tuple(column), len(numbers)) for column in slots[:, starts].T.tolist()]
    groups = np.repeat(np.array(runs, dtype=np.int64), np.diff(starts, append=num_tokens))
    return TokenGroups(torch.from_numpy(groups).to(device), np.array(list(numbers), dtype=np.int64).T, gates)


def run_starts(values: NDArray[np.int64]) -> NDArray[np.int64]:  # [.., n]
    """Where runs of equal values begin along the last axis."""
    rows = np.atleast_2d(values)
    changes = (rows[:, 1:] != rows[:, :-1]).any(axis=0)
    return np.concatenate((np.zeros(1, dtype=np.int64), 1 + np.flatnonzero(changes)))


def _first_free(slots: NDArray[np.int64]) -> int:  # [links, some tokens]
    """The first link that none of the tokens has yet."""
    for link, row in enumerate(slots):
        if (row == NO_SLOT).all():
            return link
    return len(slots)
