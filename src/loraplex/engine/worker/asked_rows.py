"""The rows of a packed pass whose residuals and steering the compiled kernel computes, and where their tokens are."""

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from loraplex.engine.kv.residual_cache import ResidualCache
from loraplex.engine.sched.captures import SequenceAttention
from loraplex.engine.worker.asked_records import RECORD_INTS, RowRecords, WeightCache
from loraplex.engine.worker.input_batch import InputBatch
from loraplex.residual.rows import RowAttention

AskedTensors = tuple[
    Tensor, Tensor
]  # int64 [groups, layers, 3] as csrc/asked.h has it; [tokens] each one's group or -1
_Place = tuple[SequenceAttention, int, int]  # and its tokens' first and number


class AskedRows:
    """Those of one pass: a group is a row."""

    def __init__(
        self,
        rows: Sequence[tuple[RowAttention, RowRecords]],
        groups: Tensor,  # [tokens]
        num_heads: Mapping[int, int],  # by layer
    ) -> None:
        self._rows, self._groups, self._num_heads = rows, groups, num_heads
        self._tensors: dict[tuple[int | None, ...], AskedTensors] = {}

    def tensors(self, layers: tuple[int | None, ...]) -> AskedTensors:
        """What the kernel reads about some layers; nothing is asked of one that isn't known (None)."""
        if layers not in self._tensors:
            table = [[self._record(records, layer) for layer in layers] for _, records in self._rows]
            values = torch.tensor(table, dtype=torch.int64).view(len(self._rows), len(layers), RECORD_INTS)
            self._tensors[layers] = (values, self._groups)
        return self._tensors[layers]

    def _record(self, records: RowRecords, layer: int | None) -> tuple[int, int, int]:
        return (0, 0, 0) if layer is None else records.at(layer, self._num_heads[layer])

    @cached_property
    def layers_with_links(self) -> frozenset[int]:
        """Those at which some row has residuals."""
        return frozenset(layer for layer in self._num_heads if any(row.chain_at(layer) for row, _ in self._rows))

    @cached_property
    def layers_with_steering(self) -> frozenset[int]:
        """Those at which some row is steered."""
        return frozenset(layer for layer in self._num_heads if any(row.steering_at(layer) for row, _ in self._rows))

    @cached_property
    def layers(self) -> frozenset[int]:
        """Those at which some row asks for anything."""
        return self.layers_with_links | self.layers_with_steering


class AskedRowCache:
    """Makes the AskedRows of each pass, and keeps the last: rows are decoded together for many steps."""

    def __init__(self, cache: ResidualCache) -> None:
        self._cache = cache
        self._weights = WeightCache()
        self._made: tuple[tuple[object, ...], list[_Place], AskedRows] | None = None
        self._records: dict[int, tuple[SequenceAttention, RowRecords]] = {}  # by the row's identity

    def of(self, batch: InputBatch, num_heads: Mapping[int, int]) -> AskedRows | None:
        """Of the chunks that don't stand alone; None if there are none."""
        places = [
            (asked, batch.offsets[chunk], batch.chunks[chunk].count)
            for chunk, asked in batch.asking.items()
            if not asked.stands_alone
        ]
        if not places:
            self.forget()
            return None
        spans = ((id(asked), first, count) for asked, first, count in places)
        key: tuple[object, ...] = (batch.num_tokens, self._cache.num_cleared, *spans)
        if self._made is None or self._made[0] != key:
            self._made = (key, places, self._make(places, batch, num_heads))
        return self._made[2]

    def forget(self) -> None:
        """No row asks for anything: keep nothing of the last ones."""
        self._made = None
        self._records = {}

    def _make(self, places: Sequence[_Place], batch: InputBatch, num_heads: Mapping[int, int]) -> AskedRows:
        if self._made is not None and self._made[0][1] != self._cache.num_cleared:
            self._records = {}
        known = self._records
        self._records = {
            id(asked): known.get(id(asked)) or (asked, RowRecords(asked.row, self._cache, self._weights))
            for asked, _, _ in places
        }
        groups = torch.full((batch.num_tokens,), -1, dtype=torch.int64)
        for number, (_, first, count) in enumerate(places):
            groups[first : first + count] = number
        rows = [(asked.row, self._records[id(asked)][1]) for asked, _, _ in places]
        return AskedRows(rows, groups, num_heads)
