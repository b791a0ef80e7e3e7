"""Which adapters each token of a pass has, for layers that take tokens out of their order: feed-forward experts."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from loraplex.routing.layer_gates import GateColumn
from loraplex.routing.segments import Segment

NO_SLOT = -1


class TokenGroups(NamedTuple):
    """Tokens of one group go through the same slots, each with its own gates."""

    groups: Tensor  # [tokens] int64
    slots: Tensor  # [groups, links] int64; NO_SLOT: none
    gates: Tensor  # [links, tokens] float32


def group_tokens(segments: Sequence[Segment], num_tokens: int, device: torch.device) -> TokenGroups:
    """The groups of a plan's tokens; a token's adapters keep the order in which the segments name them."""
    slots = np.full((1, num_tokens), NO_SLOT, dtype=np.int64)
    gates = np.zeros((1, num_tokens), dtype=np.float32)
    for start, stop, slot, gate in segments:
        assert not isinstance(gate, GateColumn), "an adapter of stacked experts became an expert of a mixture"
        taken = (slots[:, start:stop] != NO_SLOT).any(axis=1)
        link = int(taken.argmin()) if not taken.all() else len(slots)
        if link == len(slots):
            slots = np.concatenate((slots, np.full((1, num_tokens), NO_SLOT, dtype=np.int64)))
            gates = np.concatenate((gates, np.zeros((1, num_tokens), dtype=np.float32)))
        slots[link, start:stop] = slot
        gates[link, start:stop] = gate.float().cpu().numpy() if isinstance(gate, Tensor) else gate
    found, groups = np.unique(slots, axis=1, return_inverse=True)
    return TokenGroups(
        torch.from_numpy(groups.reshape(-1)).to(device),
        torch.from_numpy(np.ascontiguousarray(found.T)).to(device),
        torch.from_numpy(gates).to(device),
    )
