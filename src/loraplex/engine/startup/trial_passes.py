"""Packed passes over made-up sequences, which are run when an engine starts to see what they give."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from loraplex.engine.kv.block_pool import BlockPool, BlockTable
from loraplex.engine.kv.kv_cache import KeyValueCache
from loraplex.engine.kv.sequence_kv import SequenceKV
from loraplex.engine.sched.chunk import ScheduledChunk
from loraplex.engine.worker.input_batch import InputBatch

_LONG = (40, 264)  # tokens at least, so that many see something that begins behind a short prompt's end; and at most
SHORT_LENGTH = 6  # of a sequence that begins far behind
_MAX_FAR = 16  # sequences
# Settings that may be the number of tokens from which on something changes inside a sequence, by their names.
_LENGTHS = ("window", "chunk", "topk", "top_k", "block", "local", "keep", "original", "floor", "compress")


@dataclass(frozen=True)
class TrialRow:
    """A sequence, and the position that the model is told for its first token."""

    tokens: tuple[int, ...]
    offset: int = 0
    is_cached: bool = False  # the model by itself is told by a cache that it has seen the tokens before


def trial_groups(base: PreTrainedModel, longest: int, step: int = 1) -> list[list[TrialRow]]:
    """Groups of sequences of one length: a long one, and many short ones that begin at far positions.

    These stand before, at and behind every number of the configuration, and at the end of what the model is run for.
    One at the end follows tokens of a cache, at a multiple of `step`: some models count their tokens by that.
    """
    settings = _numbers(base.config.get_text_config(decoder=True).to_dict())
    lengths = [
        n for name, n in settings if any(chunk in name for chunk in _LENGTHS) and 2 * n + SHORT_LENGTH <= _LONG[1]
    ]
    long = min(max(_LONG[0], *(2 * n + SHORT_LENGTH for n in lengths), 0), longest)
    most = longest - SHORT_LENGTH
    named = [n for name, n in settings if any(chunk in name for chunk in (*_LENGTHS, "position", "length"))]
    starts = [most, *(n - SHORT_LENGTH // 2 for n in [*named, *(2**power for power in range(6, most.bit_length()))])]
    far = list(dict.fromkeys(start for start in starts if SHORT_LENGTH < start <= most))[:_MAX_FAR]
    draw = _Tokens(base)
    groups = [[TrialRow(draw(long))]]
    if far:
        groups.append([TrialRow(draw(SHORT_LENGTH), start) for start in far])
    if most >= step:
        groups.append([TrialRow(draw(SHORT_LENGTH), most // step * step, is_cached=True)])
    return groups


class _Tokens:
    """Draws tokens that mean nothing to the model: none that begins an image, ends a text or pads it."""

    def __init__(self, base: PreTrainedModel) -> None:
        special = {n for name, n in _numbers(base.config.to_dict()) if "token" in name}
        size = min(int(getattr(base.get_input_embeddings(), "num_embeddings", 1)), 10_000)
        self._ids = [token for token in range(size) if token not in special] or [0]
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self, count: int) -> tuple[int, ...]:
        places = torch.randint(len(self._ids), (count,), generator=self._generator)
        return tuple(self._ids[place] for place in places.tolist())


def _numbers(settings: dict[str, Any], prefix: str = "") -> list[tuple[str, int]]:
    """All whole numbers among nested settings, by name."""
    found = []
    for name, value in settings.items():
        if isinstance(value, dict):
            found += _numbers(value, f"{name}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and value == value and value % 1 == 0:
            found.append((prefix + name, int(value)))
        elif isinstance(value, list) and all(isinstance(item, int) for item in value):
            found += [(prefix + name, item) for item in value]
    return found


@dataclass(frozen=True, eq=False)
class TrialIndices:
    """Where the tokens of a packed pass come from: of each group, places in the pass, rows and tokens [n] each."""

    groups: dict[int, tuple[Tensor, Tensor, Tensor]]

    def gather(self, values: dict[int, Tensor], num_tokens: int) -> Tensor:  # [1, tokens, dim]
        """From those of each group [rows, length, dim]."""
        first = next(iter(values.values()))
        result = first.new_zeros(1, num_tokens, first.shape[-1])
        for group, (places, rows, tokens) in self.groups.items():
            result[0, places] = values[group][rows, tokens]
        return result


class TrialPasses:
    """Runs groups of sequences in packed passes that hold chunks of all of them, cut at odd places."""

    def __init__(
        self, pool: BlockPool, table: BlockTable, cache: KeyValueCache, forward: Callable[[InputBatch], Tensor]
    ) -> None:
        self._pool, self._table, self._cache, self._forward = pool, table, cache, forward
        self.places: TrialIndices | None = None  # of the pass that runs

    def run(
        self, groups: Sequence[Sequence[TrialRow]], most: int | None = None, *, layer_by_layer: bool = False
    ) -> None:
        """As many sequences at once as there is room for; `most` parts of each, a chunk and then single tokens.

        `layer_by_layer` also where another engine runs layers of this base model in one call.
        """
        chosen: list[tuple[int, int, TrialRow]] = []
        free = self._pool.num_available
        for group, rows in enumerate(groups):
            for i, row in enumerate(rows):
                needed = -(-len(row.tokens) // self._pool.block_tokens)
                has_room = needed <= free and self._table.has_rows(len(chosen) + 1)
                if chosen and not has_room:
                    self._run_together(chosen, most, layer_by_layer)
                    chosen, free = [], self._pool.num_available
                chosen.append((group, i, row))
                free -= needed
        self._run_together(chosen, most, layer_by_layer)

    def _run_together(
        self, chosen: Sequence[tuple[int, int, TrialRow]], most: int | None, layer_by_layer: bool
    ) -> None:
        kvs: dict[SequenceKV, tuple[int, int]] = {}
        chunks: list[list[ScheduledChunk]] = []  # of each pass
        try:
            for group, i, row in chosen:
                kv = SequenceKV(list(row.tokens), (), (), self._pool, self._table)
                kvs[kv] = (group, i)
                kv.grow(len(row.tokens))
                for number, (start, stop) in enumerate(list(_cut(len(row.tokens)))[:most]):
                    chunks += [[]] * (number + 1 - len(chunks))
                    chunk = ScheduledChunk(
                        kv=kv,
                        start=start,
                        count=stop - start,
                        wants_logits=True,
                        wants_all_logits=True,
                        offset=row.offset,
                    )
                    chunks[number] = [*chunks[number], chunk]
            for together in chunks:
                batch = InputBatch(together, self._cache, self._table)
                batch.layer_by_layer = layer_by_layer
                self.places = _places(batch, kvs)
                self._forward(batch)
        finally:
            self.places = None
            for kv in kvs:
                kv.close()


def _cut(length: int) -> Iterator[tuple[int, int]]:
    """A prompt's first chunk, single tokens, a chunk, single tokens, and the rest."""
    start = 0
    for size in (max(1, length * 2 // 5), 1, 1, max(1, length // 4), 1):
        if start < length:
            yield start, min(start + size, length)
        start += size
    if start < length:
        yield start, length


def _places(batch: InputBatch, kvs: dict[SequenceKV, tuple[int, int]]) -> TrialIndices:
    device = batch.positions.device
    found: dict[int, list[tuple[int, int, int]]] = {}
    for i, chunk in enumerate(batch.chunks):
        group, row = kvs[chunk.kv]
        for token in range(chunk.count):
            found.setdefault(group, []).append((batch.offsets[i] + token, row, chunk.start + token))
    return TrialIndices({group: tuple(torch.tensor(of, device=device).T) for group, of in found.items()})
