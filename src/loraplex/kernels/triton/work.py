"""What the kernels work through: tiles of tokens, and for each tile the adapters that its tokens go through."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

# Tokens of a tile: the fewest that a matrix product takes, and more where rows are long. By the layout alone, so that a
# row's bits don't depend on what its neighbours use.
SMALL_TILE_TOKENS = 16
LARGE_TILE_TOKENS = 64


class WorkList(NamedTuple):
    """The tiles of a packed batch. A token is in one tile at most; one whose segments are all closed is in none.

    Every pair of a token and one of its segments has a row in rank space; an entry's rows follow each other.
    """

    tiles: Tensor  # [tiles, 4]  int32: first token, tokens, first entry, entries
    entries: Tensor  # [entries, 4]  int32: first token, tokens, slot, first row
    block_tokens: int
    num_rows: int


class SlotFactors(NamedTuple):
    """The slots' weights, where they lie, and what of them a batch needs."""

    table: Tensor  # [slots, modules, 3]  int64: addresses of lora_a and lora_b, rank
    scalings: Tensor  # [slots, modules]  float32
    max_rank: int  # no slot of the batch has a larger one
    aligned: bool  # whether all addresses are multiples of 16


class RouteWork(NamedTuple):
    """The mixtures of a packed batch, in tiles of their tokens."""

    tiles: Tensor  # [tiles, 4]  int32: first token, tokens, first expert, experts
    experts: Tensor  # [experts, 4]  int32: slot, row in rank space of token 0 (may be negative), kind, top_k (0: all)
    settings: Tensor  # [experts, 3]  float32: temperature, top_p (0: all), weight
    parameters: Tensor  # [experts, modules]  int64: addresses of float32 parameters; 0: doesn't adapt the module
    max_experts: int  # of a mixture
    told: Tensor  # [experts, 2]  int64: where the gate of token 0 is kept in a module's row, and the step to the next
    # token's, 0: it isn't kept
    kept: Tensor | None  # [modules, m]  float32: the gates that are kept, without weights


Quadruples = list[tuple[int, int, int, int]]


def tokens_of_a_tile(tokens_per_row: int) -> int:
    """How many tokens a tile has at most, in a batch whose longest row has so many."""
    return LARGE_TILE_TOKENS if tokens_per_row >= LARGE_TILE_TOKENS else SMALL_TILE_TOKENS


def cut_work(segments: Sequence[Sequence[int]], block_tokens: int) -> tuple[Quadruples, Quadruples]:
    """The tiles and entries of segments (start, stop, slot, first row), which may overlap, in the order of the tokens.

    Between two neighbouring ends of segments all tokens go through the same ones: such an interval is cut into tiles,
    and a tile's program adds up all its segments before it rounds and writes. An interval's entries keep the order of
    `segments`, so a row's sum has the order of its link.
    """
    tiles: Quadruples = []
    entries: Quadruples = []
    opening = sorted((s for s in enumerate(segments) if s[1][0] < s[1][1]), key=lambda s: s[1][0])
    bounds = sorted({bound for _, segment in opening for bound in segment[:2]})
    active: list[tuple[int, Sequence[int]]] = []
    next_opening = 0
    for first, end in pairwise(bounds):
        active = [(i, segment) for i, segment in active if segment[1] > first]
        while next_opening < len(opening) and opening[next_opening][1][0] == first:
            active.append(opening[next_opening])
            next_opening += 1
        active.sort(key=lambda s: s[0])
        if not active:
            continue
        for start in range(first, end, block_tokens):
            count = min(block_tokens, end - start)
            tiles.append((start, count, len(entries), len(active)))
            entries += [(start, count, slot, row + start - begin) for _, (begin, _, slot, row) in active]
    return tiles, entries


def make_work(segments: Sequence[Sequence[int]], block_tokens: int, device: torch.device) -> WorkList:
    """The work list of segments (start, stop, slot, first row) on a device."""
    tiles, entries = cut_work(segments, block_tokens)
    both = torch.tensor(tiles + entries, dtype=torch.int32).view(-1, 4).to(device, non_blocking=True)  # one copy
    return WorkList(
        tiles=both[: len(tiles)],
        entries=both[len(tiles) :],
        block_tokens=block_tokens,
        num_rows=sum(stop - start for start, stop, _, _ in segments if start < stop),
    )


def make_route_work(
    routing: Sequence[Tensor],  # as the compiled kernel takes it (kernels/csrc/arguments.h)
    rows: Sequence[Sequence[int]],  # start, stop, slot and first row of each segment
    block_tokens: int,
    device: torch.device,
) -> RouteWork:
    """The routers of a plan, on a device."""
    places, settings, parameters, *record = routing
    told: list[tuple[int, int]] = []
    experts: list[tuple[int, int, int, int]] = []
    tiles: list[tuple[int, int, int, int]] = []
    groups: dict[int, list[int]] = {}
    for i, (row, group, kind, top_k) in enumerate(places.tolist()):
        start, _, slot, first = rows[row]
        experts.append((slot, first - start, kind, top_k))
        column, step = record[0][i].tolist() if record else (-1, 0)
        told.append((column - start * step, step) if column >= 0 else (0, 0))
        groups.setdefault(group, []).append(i)
    for members in groups.values():
        start, stop = rows[int(places[members[0], 0])][:2]
        tiles += [
            (first, min(block_tokens, stop - first), members[0], len(members))
            for first in range(start, stop, block_tokens)
        ]
    both = torch.tensor(tiles + experts, dtype=torch.int32).view(-1, 4).to(device, non_blocking=True)
    return RouteWork(
        tiles=both[: len(tiles)],
        experts=both[len(tiles) :],
        settings=settings.to(device, non_blocking=True),
        parameters=parameters.to(device, non_blocking=True),
        max_experts=max(map(len, groups.values())),
        told=torch.tensor(told, dtype=torch.int64).to(device, non_blocking=True),
        kept=record[1] if record else None,
    )
