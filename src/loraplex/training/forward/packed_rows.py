"""Packed rows: all of a pass in one sequence without padding, each attending to itself and its prefix alone.

Linear layers see every token once, a shared prefix too. Attention takes the rows apart again, into groups of
similar length, so that no token's keys meet another record's queries. Positions begin anew in every row.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from loraplex.routing.plan import RoutingPlan
from loraplex.routing.segments import Segment
from loraplex.routing.weight_provider import WeightProvider
from loraplex.training.forward.batch import (
    PrefixGroup,
    RowBatch,
    RowSpan,
    TrainingRouting,
    TrainingRow,
    cut_sizes,
    make_span,
    prefix_span,
    row_weights,
    segments_of,
)

_GROUP_COST = 64  # tokens that one more group of attention costs as much as


class _Piece(NamedTuple):
    """What stands in a row of the pack: a shared prefix, or a record after it."""

    row: TrainingRow
    start: int  # in the pack
    ids: Sequence[int]
    position: int  # of its first token
    prefix: int | None  # index of the piece that comes before it
    span: RowSpan


@dataclass(frozen=True)
class AttentionGroup:
    """Pieces of similar length: where their tokens stand in the pack."""

    queries: Tensor  # [pieces, padded]
    keys: Tensor  # [pieces, prefix + padded]
    mask: Tensor  # [pieces, 1, padded, prefix + padded]  what each query sees
    targets: Tensor  # [tokens]  where the outputs go in the pack
    sources: Tensor  # [tokens]  and where they come from in [pieces * padded]


@dataclass(frozen=True)
class PackedLayout:
    """The pieces of one pack, for routing and attention."""

    starts: Sequence[int]
    lengths: Sequence[int]
    groups: Sequence[AttentionGroup]
    order: Tensor  # [tokens]  where each token of the pack stands among the outputs of all groups


def pack_batches(
    rows: Sequence[TrainingRow],
    prefix_lengths: Mapping[PrefixGroup, int],
    max_tokens: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Iterator[RowBatch]:
    """The rows in packs of at most `max_tokens` tokens, or one row that is longer; each made when it is asked for."""
    pack: list[TrainingRow] = []
    size, groups = 0, set[PrefixGroup]()
    for row in sorted(rows, key=lambda row: row.prefix_group):
        prefix = prefix_lengths.get(row.prefix_group, 0)
        own = len(row.example.inputs) - prefix
        if pack and size + own + (0 if row.prefix_group in groups else prefix) > max_tokens:
            yield make_pack(pack, prefix_lengths, device, dtype)
            pack, size, groups = [], 0, set()
        size += own + (0 if row.prefix_group in groups else prefix)
        groups.add(row.prefix_group)
        pack.append(row)
    if pack:
        yield make_pack(pack, prefix_lengths, device, dtype)


def make_pack(
    rows: Sequence[TrainingRow], prefix_lengths: Mapping[PrefixGroup, int], device: torch.device, dtype: torch.dtype
) -> RowBatch:
    """One pack of these rows; each shared prefix stands once before its rows."""
    pieces = _pieces(rows, prefix_lengths)
    records = [piece for piece in pieces if piece.span.outputs]
    positions = [piece.start + at for piece in records for at in piece.span.outputs]
    groups = _groups(pieces, device)
    order = torch.argsort(torch.cat([group.targets for group in groups]))
    layout = PackedLayout([p.start for p in pieces], [len(p.ids) for p in pieces], groups, order)
    return RowBatch(
        rows=[piece.row for piece in records],
        spans=[piece.span for piece in pieces],
        input_ids=torch.tensor([[token for piece in pieces for token in piece.ids]], device=device),
        position_ids=torch.tensor(
            [[at for piece in pieces for at in range(piece.position, piece.position + len(piece.ids))]], device=device
        ),
        attention_mask=_dense_mask(pieces, device, dtype),
        output_rows=torch.zeros(len(positions), dtype=torch.int64, device=device),
        output_positions=torch.tensor(positions, device=device),
        targets=torch.tensor([token for piece in records for token in piece.row.example.targets], device=device),
        jobs=torch.tensor([piece.row.job for piece in records for _ in piece.span.outputs], device=device),
        weights=row_weights([piece.row for piece in records], device),
        packed=layout,
        records=torch.tensor([n for n, piece in enumerate(records) for _ in piece.span.outputs], device=device),
    )


def _pieces(rows: Sequence[TrainingRow], prefix_lengths: Mapping[PrefixGroup, int]) -> list[_Piece]:
    pieces: list[_Piece] = []
    prefix_of: dict[PrefixGroup, int] = {}
    start = 0
    for row in rows:
        prefix = prefix_lengths.get(row.prefix_group, 0)
        if prefix and row.prefix_group not in prefix_of:
            prefix_of[row.prefix_group] = len(pieces)
            ids = row.example.inputs[:prefix]
            pieces.append(_Piece(row, start, ids, 0, None, prefix_span(row, prefix)))
            start += prefix
        ids = row.example.inputs[prefix:]
        outputs = [index - 1 - prefix for index in row.example.answer]
        span = make_span(row, prefix, len(ids), outputs)
        pieces.append(_Piece(row, start, ids, prefix, prefix_of.get(row.prefix_group), span))
        start += len(ids)
    return pieces


def _groups(pieces: Sequence[_Piece], device: torch.device) -> list[AttentionGroup]:
    ordered = sorted(pieces, key=lambda piece: len(piece.ids), reverse=True)
    groups, first = [], 0
    for size in cut_sizes([len(piece.ids) for piece in ordered], 1 << 30, _GROUP_COST):
        groups.append(_group(ordered[first : first + size], pieces, device))
        first += size
    return groups


def _group(chosen: Sequence[_Piece], pieces: Sequence[_Piece], device: torch.device) -> AttentionGroup:
    padded = len(chosen[0].ids)
    before = [None if piece.prefix is None else pieces[piece.prefix] for piece in chosen]
    longest = max(0 if prefix is None else len(prefix.ids) for prefix in before)
    steps, columns = torch.arange(padded), torch.arange(longest)
    starts = torch.tensor([piece.start for piece in chosen]).unsqueeze(1)
    lengths = torch.tensor([len(piece.ids) for piece in chosen]).unsqueeze(1)
    first = torch.tensor([0 if prefix is None else prefix.start for prefix in before]).unsqueeze(1)
    of_prefix = torch.tensor([0 if prefix is None else len(prefix.ids) for prefix in before]).unsqueeze(1)
    own = starts + torch.minimum(steps, lengths - 1)  # padding repeats the last token, which no other sees
    earlier = first + torch.minimum(columns, (of_prefix - 1).clamp_min(0))
    causal = (steps <= steps.unsqueeze(1)).expand(len(chosen), padded, padded)
    visible = (columns < of_prefix).unsqueeze(1).expand(len(chosen), padded, longest)
    real = steps < lengths
    return AttentionGroup(
        queries=own.to(device),
        keys=torch.cat([earlier, own], dim=1).to(device),
        mask=torch.cat([visible, causal], dim=2).unsqueeze(1).to(device),
        targets=own[real].to(device),
        sources=real.reshape(-1).nonzero().squeeze(1).to(device),
    )


def _dense_mask(pieces: Sequence[_Piece], device: torch.device, dtype: torch.dtype) -> Tensor:  # [1, 1, tokens, tokens]
    """The same for attention that the training's own doesn't stand in front of: 0 where a token sees another."""
    lengths = [len(piece.ids) for piece in pieces]
    piece_of = torch.repeat_interleave(torch.arange(len(pieces)), torch.tensor(lengths))
    prefix_of = torch.tensor([-1 if piece.prefix is None else piece.prefix for piece in pieces])[piece_of]
    index = torch.arange(len(piece_of))
    same = (piece_of.unsqueeze(1) == piece_of) & (index <= index.unsqueeze(1))
    sees = same | (prefix_of.unsqueeze(1) == piece_of)
    mask = torch.zeros(sees.shape, dtype=dtype).masked_fill_(~sees, torch.finfo(dtype).min)
    return mask[None, None].to(device)


class PackedRowsRouting(TrainingRouting):
    """The plan for a pack, however a layer sees its tokens, and for the positions that reach the output layer."""

    def __init__(self, batch: RowBatch, bank: WeightProvider) -> None:
        super().__init__(batch.spans, batch.padded_length, bank)
        assert batch.packed is not None, "the batch is not packed"
        self._layout = batch.packed

    def _build(self, num_sequences: int, length: int) -> RoutingPlan:
        num_tokens = num_sequences * length
        if num_tokens == self._padded_length:  # if all of its tokens count, both layouts are the same
            return RoutingPlan(self._packed_segments(), num_tokens, self.bank)
        return super()._build(num_sequences, length)

    def _packed_segments(self) -> list[Segment]:
        pieces = zip(self._layout.starts, self._layout.lengths, self._spans, strict=True)
        return [segment for start, length, span in pieces for segment in segments_of(span, start, length)]
