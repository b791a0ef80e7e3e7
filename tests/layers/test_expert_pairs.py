"""The pairs of tokens and experts, against a loop over all of them."""

import numpy as np
import pytest
import torch

from loraplex.layers.experts.expert_pairs import ExpertPairs
from loraplex.routing.segments import Segment
from loraplex.routing.token_groups import NO_SLOT, group_tokens

CPU = torch.device("cpu")
# Base tokens, a link, one adapter twice, and one that begins inside a row.
SEGMENTS = [
    Segment(2, 5, 7, 0.5),
    Segment(8, 10, 7, 2.0),
    Segment(2, 5, 3, -1.0),
    Segment(6, 8, 0, torch.tensor([0.25, 0.75])),
]


def expected(segments: list[Segment], token: int) -> list[tuple[int, float]]:
    found = []
    for start, stop, slot, gate in segments:
        if start <= token < stop:
            found.append((slot, float(gate[token - start]) if isinstance(gate, torch.Tensor) else gate))
    return found


@pytest.mark.parametrize(("segments", "num_tokens"), [(SEGMENTS, 10), (SEGMENTS[:1], 5), ([Segment(0, 1, 4, 1.0)], 1)])
def test_every_token_has_its_slots_and_gates(segments: list[Segment], num_tokens: int) -> None:
    groups = group_tokens(segments, num_tokens, CPU)
    for token in range(num_tokens):
        slots = groups.slots[:, groups.groups[token]]
        found = [(int(slot), float(groups.gates[link, token])) for link, slot in enumerate(slots) if slot != NO_SLOT]
        assert sorted(found) == sorted(expected(segments, token))
    assert len({tuple(column) for column in groups.slots.T}) == groups.slots.shape[1]


@pytest.mark.parametrize(("num_tokens", "top_k"), [(10, 3), (10, 1), (1, 1), (1, 4)])
def test_segments_cover_every_pair_with_its_expert_and_adapters(num_tokens: int, top_k: int) -> None:
    segments = SEGMENTS if num_tokens == 10 else [Segment(0, 1, 4, 1.5)]
    draw = torch.Generator().manual_seed(0)
    chosen = torch.stack([torch.randperm(5, generator=draw)[:top_k] for _ in range(num_tokens)])
    pairs = ExpertPairs(chosen, 5, group_tokens(segments, num_tokens, CPU))
    wanted = sorted(
        (token, int(expert), slot, gate)
        for token in range(num_tokens)
        for expert in chosen[token]
        for slot, gate in expected(segments, token)
    )
    found = []
    for start, stop, slot, expert, first in pairs.segments.tolist():
        for i in range(stop - start):
            assert pairs.experts[start + i] == expert
            found.append((int(pairs.tokens[start + i]), expert, slot, float(pairs.gates[first + i])))
    assert sorted(found) == wanted
    counts = torch.bincount(chosen.reshape(-1), minlength=5)
    assert pairs.stops.tolist() == counts.cumsum(0).tolist()
    assert pairs.in_own_order(pairs.tokens).view(num_tokens, top_k).eq(torch.arange(num_tokens).unsqueeze(1)).all()
    assert np.array_equal(pairs.rows(100)[:, 2].numpy(), pairs.segments[:, 2] * 100 + pairs.segments[:, 3])
