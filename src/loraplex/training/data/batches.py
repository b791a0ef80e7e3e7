"""The rows of all jobs, cut into padded batches for one forward pass each."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from loraplex.training.data.examples import Example
from loraplex.training.forward.routing import FrozenSlot, RowSpan


class TrainingRow(NamedTuple):
    """One record on its way through its job's adapter."""

    job: int
    slot: int  # the job's, or with dropout the row's own
    example: Example
    has_dropout: bool = False
    first_adapted: int = 0  # aLoRA: the invocation's first token
    frozen: Sequence[FrozenSlot] = ()  # what the row goes through besides


class RowBatch(NamedTuple):
    """Rows padded on the right; a job's shared prefix, of which only the keys and values are needed, is left out."""

    rows: Sequence[TrainingRow]
    spans: Sequence[RowSpan]
    input_ids: Tensor  # [rows, padded]
    position_ids: Tensor | None  # [rows, padded]; None: from 0 on in every row
    attention_mask: Tensor | None  # [rows, prefix + padded]; None: causal attention alone
    output_rows: Tensor  # [outputs]  where a token is predicted that counts
    output_positions: Tensor  # [outputs]
    targets: Tensor  # [outputs]
    jobs: Tensor  # [outputs]

    @property
    def padded_length(self) -> int:
        return self.input_ids.shape[1]


def shared_prefix_lengths(rows: Sequence[TrainingRow]) -> dict[int, int]:
    """By job, how many first tokens all of its rows share and compute alike, before the first that counts.

    With dropout rows compute differently from the first token on. An aLoRA's rows are the base model's up to
    the invocation.
    """
    lengths: dict[int, int] = {}
    first_of: dict[int, TrainingRow] = {}
    for row in rows:
        first = first_of.setdefault(row.job, row)
        most = 0 if row.has_dropout else row.example.answer[0] - 1
        if row.first_adapted:
            most = min(most, row.first_adapted)
        most = min(most, lengths.get(row.job, most))
        pairs = zip(first.example.inputs[:most], row.example.inputs[:most], strict=True)
        lengths[row.job] = next((index for index, (a, b) in enumerate(pairs) if a != b), most)
    return lengths


def cut_rows(
    rows: Sequence[TrainingRow], prefix_lengths: Mapping[int, int], max_tokens: int, forward_cost: int
) -> list[list[TrainingRow]]:
    """Group rows of similar length so that padding and the number of forwards cost least; jobs stand together."""

    def length(row: TrainingRow) -> int:
        return len(row.example.inputs) - prefix_lengths.get(row.job, 0)

    ordered = sorted(rows, key=length, reverse=True)
    groups, first = [], 0
    for size in cut_sizes([length(row) for row in ordered], max_tokens, forward_cost):
        groups.append(sorted(ordered[first : first + size], key=lambda row: row.job))
        first += size
    return groups


def cut_sizes(lengths: Sequence[int], max_tokens: int, forward_cost: int) -> list[int]:
    """Sizes of the groups into which descending lengths are cut at least cost.

    A group costs its padded tokens, at most `max_tokens` unless a single row has more, and `forward_cost` tokens.
    """
    best: list[tuple[int, int]] = [(0, 0)]  # of the first n rows: the cost, and the size of the last group
    for stop in range(1, len(lengths) + 1):
        options = []
        for first in range(stop - 1, -1, -1):
            padded = (stop - first) * lengths[first]
            if padded > max_tokens and stop - first > 1:
                break
            options.append((best[first][0] + padded + forward_cost, stop - first))
        best.append(min(options))
    sizes = []
    stop = len(lengths)
    while stop > 0:
        sizes.append(best[stop][1])
        stop -= sizes[-1]
    return sizes[::-1]


def make_batch(rows: Sequence[TrainingRow], prefix_lengths: Mapping[int, int], device: torch.device) -> RowBatch:
    """Pad the rows' tokens after their shared prefixes."""
    prefixes = [prefix_lengths.get(row.job, 0) for row in rows]
    inputs = [row.example.inputs[prefix:] for row, prefix in zip(rows, prefixes, strict=True)]
    outputs = [[index - 1 - prefix for index in row.example.answer] for row, prefix in zip(rows, prefixes, strict=True)]
    padded = max(map(len, inputs))
    positions, mask = _positions_and_mask(inputs, prefixes, max(prefix_lengths.values(), default=0), padded)
    return RowBatch(
        rows=rows,
        spans=[
            _span(row, prefix, len(ids), at)
            for row, prefix, ids, at in zip(rows, prefixes, inputs, outputs, strict=True)
        ],
        input_ids=torch.tensor([[*ids, *[0] * (padded - len(ids))] for ids in inputs], device=device),
        position_ids=None if positions is None else positions.to(device),
        attention_mask=None if mask is None else mask.to(device),
        output_rows=torch.tensor([row for row, at in enumerate(outputs) for _ in at], device=device),
        output_positions=torch.tensor([position for at in outputs for position in at], device=device),
        targets=torch.tensor([token for row in rows for token in row.example.targets], device=device),
        jobs=torch.tensor([row.job for row in rows for _ in row.example.answer], device=device),
    )


def _span(row: TrainingRow, prefix: int, num_tokens: int, outputs: Sequence[int]) -> RowSpan:
    start = min(max(0, row.first_adapted - prefix), num_tokens)
    return RowSpan(row.slot, start, num_tokens if row.has_dropout else None, outputs, row.frozen)


def _positions_and_mask(
    inputs: Sequence[Sequence[int]], prefixes: Sequence[int], prefix: int, padded: int
) -> tuple[Tensor | None, Tensor | None]:
    """Positions and attention mask where a prefix comes first; padding on the right alone needs neither."""
    if prefix == 0:
        return None, None
    lengths = torch.tensor([len(ids) for ids in inputs]).unsqueeze(1)
    first = torch.tensor(prefixes).unsqueeze(1)
    steps = torch.arange(padded).unsqueeze(0)
    # Padding repeats the last position: learned positions end at the longest row.
    positions = first + torch.minimum(steps, lengths - 1)
    mask = torch.cat([torch.arange(prefix).unsqueeze(0) < first, steps < lengths], dim=1)
    return positions, mask.long()
