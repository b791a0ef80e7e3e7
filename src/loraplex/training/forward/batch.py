"""The rows of all jobs, cut into padded batches for one forward pass each, and the routing of each row to its slot."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from loraplex.adapters.store.expert_table import ExpertTable
from loraplex.adapters.store.module_change import ModuleChange
from loraplex.adapters.store.slot_weights import SlotWeights
from loraplex.routing.plan import RoutingPlan
from loraplex.routing.rows import Route, RowRouting
from loraplex.routing.segments import Segment
from loraplex.routing.weight_provider import WeightProvider
from loraplex.training.data.examples import Example

if TYPE_CHECKING:
    from loraplex.training.forward.packed_rows import PackedLayout

# What a forward and backward pass costs before its first token, in tokens: a few on a CPU, where a token is slow.
FORWARD_COST = {"cpu": 64}
FORWARD_COST_ELSEWHERE = 1024


PrefixGroup = tuple[int, float]  # rows of one job and one gate before the user's turn: they may share a prefix


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
    num_gated: int = 0  # the first tokens from `start` on, which have
    gate: float = 1.0  # this gate; all others 1


class TrainingRow(NamedTuple):
    """One record on its way through its job's adapter."""

    job: int
    slot: int  # the job's, or with dropout the row's own
    example: Example
    has_dropout: bool = False
    frozen: Sequence[FrozenSlot] = ()  # what the row goes through besides
    gate_before_user: float = 1.0  # of the tokens before the first user turn's content
    weight: float = 1.0  # of the row's losses in the gradient
    is_moved: bool = False  # by its job's interventions, at tokens that the prompt's length tells: it shares no prefix

    @property
    def prefix_group(self) -> PrefixGroup:
        return self.job, self.gate_before_user


class RowBatch(NamedTuple):
    """Rows padded on the right; a shared prefix, of which only the keys and values are needed, is left out."""

    rows: Sequence[TrainingRow]
    spans: Sequence[RowSpan]
    input_ids: Tensor  # [rows, padded]
    position_ids: Tensor | None  # [rows, padded]; None: from 0 on in every row
    attention_mask: Tensor | None  # [rows, prefix + padded]; None: causal attention alone
    output_rows: Tensor  # [outputs]  where a token is predicted that counts
    output_positions: Tensor  # [outputs]
    targets: Tensor  # [outputs]
    jobs: Tensor  # [outputs]
    weights: Tensor | None = None  # [outputs]  of losses in the gradient; None: 1
    packed: "PackedLayout | None" = None  # of rows that stand behind each other in one (packed_rows.py)
    is_filler: bool = False  # runs because other processes run a batch, and counts for nothing
    records: Tensor | None = None  # [outputs]  of a pack: the record's index in `rows`

    @property
    def output_records(self) -> Tensor:  # [outputs]
        """Whose each output is: an index into `rows`."""
        return self.output_rows if self.records is None else self.records

    @property
    def padded_length(self) -> int:
        return self.input_ids.shape[1]


def shared_prefix_lengths(rows: Sequence[TrainingRow]) -> dict[PrefixGroup, int]:
    """By group, how many first tokens all of its rows share and compute alike, before the first that counts.

    With dropout rows compute differently from the first token on. An aLoRA's rows are the base model's up to
    the invocation. A gate before the user's turn ends where that begins.
    """
    lengths: dict[PrefixGroup, int] = {}
    first_of: dict[PrefixGroup, TrainingRow] = {}
    for row in rows:
        first = first_of.setdefault(row.prefix_group, row)
        most = 0 if row.has_dropout or row.is_moved else row.example.answer[0] - 1
        if row.example.first_adapted:
            most = min(most, row.example.first_adapted)
        if row.gate_before_user != 1:
            most = min(most, row.example.num_before_user)
        most = min(most, lengths.get(row.prefix_group, most))
        pairs = zip(first.example.inputs[:most], row.example.inputs[:most], strict=True)
        lengths[row.prefix_group] = next((index for index, (a, b) in enumerate(pairs) if a != b), most)
    return lengths


def forward_cost(device: torch.device) -> int:
    """What a forward and backward pass costs before its first token, in tokens."""
    return FORWARD_COST.get(device.type, FORWARD_COST_ELSEWHERE)


def cut_batches(
    rows: Sequence[TrainingRow], prefix_lengths: Mapping[PrefixGroup, int], max_tokens: int, device: torch.device
) -> Iterator[RowBatch]:
    """The rows in padded batches, each made when it is asked for."""
    for group in cut_rows(rows, prefix_lengths, max_tokens, forward_cost(device)):
        yield make_batch(group, prefix_lengths, device)


def cut_rows(
    rows: Sequence[TrainingRow], prefix_lengths: Mapping[PrefixGroup, int], max_tokens: int, cost: int
) -> list[list[TrainingRow]]:
    """Group rows of similar length so that padding and passes cost least; those of a job stand together."""

    def length(row: TrainingRow) -> int:
        return len(row.example.inputs) - prefix_lengths.get(row.prefix_group, 0)

    ordered = sorted(rows, key=length, reverse=True)
    groups, first = [], 0
    for size in cut_sizes([length(row) for row in ordered], max_tokens, cost):
        groups.append(sorted(ordered[first : first + size], key=lambda row: row.prefix_group))
        first += size
    return groups


def cut_sizes(lengths: Sequence[int], max_tokens: int, cost: int) -> list[int]:
    """Sizes of the groups into which descending lengths are cut at least cost.

    A group costs its padded tokens, at most `max_tokens` unless a single row has more, and `cost` tokens.
    """
    best: list[tuple[int, int]] = [(0, 0)]  # of the first n rows: the cost, and the size of the last group
    for stop in range(1, len(lengths) + 1):
        options = []
        for first in range(stop - 1, -1, -1):
            padded = (stop - first) * lengths[first]
            if padded > max_tokens and stop - first > 1:
                break
            options.append((best[first][0] + padded + cost, stop - first))
        best.append(min(options))
    sizes = []
    stop = len(lengths)
    while stop > 0:
        sizes.append(best[stop][1])
        stop -= sizes[-1]
    return sizes[::-1]


def make_batch(
    rows: Sequence[TrainingRow], prefix_lengths: Mapping[PrefixGroup, int], device: torch.device
) -> RowBatch:
    """Pad the rows' tokens after their shared prefixes."""
    prefixes = [prefix_lengths.get(row.prefix_group, 0) for row in rows]
    inputs = [row.example.inputs[prefix:] for row, prefix in zip(rows, prefixes, strict=True)]
    outputs = [[index - 1 - prefix for index in row.example.answer] for row, prefix in zip(rows, prefixes, strict=True)]
    padded = max(map(len, inputs))
    positions, mask = _positions_and_mask(inputs, prefixes, max(prefix_lengths.values(), default=0), padded)
    return RowBatch(
        rows=rows,
        spans=[
            make_span(row, prefix, len(ids), at)
            for row, prefix, ids, at in zip(rows, prefixes, inputs, outputs, strict=True)
        ],
        input_ids=torch.tensor([[*ids, *[0] * (padded - len(ids))] for ids in inputs], device=device),
        position_ids=None if positions is None else positions.to(device),
        attention_mask=None if mask is None else mask.to(device),
        output_rows=torch.tensor([row for row, at in enumerate(outputs) for _ in at], device=device),
        output_positions=torch.tensor([position for at in outputs for position in at], device=device),
        targets=torch.tensor([token for row in rows for token in row.example.targets], device=device),
        jobs=torch.tensor([row.job for row in rows for _ in row.example.answer], device=device),
        weights=row_weights(rows, device),
    )


def row_weights(rows: Sequence[TrainingRow], device: torch.device) -> Tensor | None:  # [outputs]
    """Of the losses in the gradient; None: all are 1."""
    if all(row.weight == 1 for row in rows):
        return None
    return torch.tensor([row.weight for row in rows for _ in row.example.answer], device=device)


def make_span(row: TrainingRow, prefix: int, num_tokens: int, outputs: Sequence[int]) -> RowSpan:
    """The span of a row's `num_tokens` tokens after a shared prefix."""
    start = min(max(0, row.example.first_adapted - prefix), num_tokens)
    stop, gate = num_tokens if row.has_dropout else None, row.gate_before_user
    num_gated = 0 if gate == 1 else min(max(0, row.example.num_before_user - prefix), num_tokens)
    if gate == 0:
        start, num_gated = max(start, num_gated), 0
    return RowSpan(row.slot, start, stop, outputs, row.frozen, num_gated, gate)


def prefix_span(row: TrainingRow, length: int) -> RowSpan:
    """The span of a shared prefix of `length` tokens, of which `row` is a row that begins with it."""
    start, gate = min(row.example.first_adapted, length), row.gate_before_user
    if gate == 0:
        start = max(start, min(row.example.num_before_user, length))
    num_gated = 0 if gate in (0, 1) else min(row.example.num_before_user, length)
    return RowSpan(row.slot, start, frozen=row.frozen, num_gated=num_gated, gate=gate)


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
        return [segment for row, span in enumerate(self._spans) for segment in segments_of(span, row * length, length)]

    def _selected_segments(self) -> list[Segment]:
        segments, first = [], 0
        for span in self._spans:
            stop = first + len(span.outputs)
            inactive = sum(position < span.start for position in span.outputs)
            gated = sum(position < span.start + span.num_gated for position in span.outputs)
            segments += _gated_segments(span, first + inactive, first + gated, stop)
            segments += [Segment(first, stop, frozen.slot, frozen.weight) for frozen in span.frozen]
            first = stop
        return segments


def segments_of(span: RowSpan, first: int, length: int) -> list[Segment]:
    """The segments of a row whose `length` tokens begin at `first`."""
    start, stop = first + span.start, first + (length if span.stop is None else span.stop)
    return [
        *_gated_segments(span, start, min(start + span.num_gated, stop), stop),
        *(Segment(first, first + length, frozen.slot, frozen.weight) for frozen in span.frozen),
    ]


def _gated_segments(span: RowSpan, start: int, between: int, stop: int) -> list[Segment]:
    """The span's segments: its own gate up to `between`, and 1 from there on."""
    gated = [Segment(start, between, span.slot, span.gate)] if start < between else []
    return [*gated, Segment(between, stop, span.slot)]


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

    def changes(self, slot: int) -> Mapping[str, ModuleChange]:
        return {}  # factors alone are trained

    def dropout(self, slot: int) -> tuple[float, torch.Generator | None]:
        return self._slots[slot].dropout, self._slots[slot].generator

    def max_rank(self, slot: int) -> int:
        return max((weights.lora_a.shape[0] for weights in self._slots[slot].layers.values()), default=0)

    def native_table(self) -> tuple[Tensor, Tensor] | None:
        return None

    def expert_table(self) -> ExpertTable | None:
        return None
