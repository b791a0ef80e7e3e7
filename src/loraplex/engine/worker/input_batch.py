"""One forward pass over chunks of many sequences, side by side in one row of tokens without padding."""

from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from loraplex.engine.kv.block_pool import BlockTable
from loraplex.engine.kv.kv_cache import AttentionTerms, KeyValueCache
from loraplex.engine.sched.chunk import ScheduledChunk
from loraplex.engine.sched.images import ImageFeatures
from loraplex.kernels.dispatch import native_runs

if TYPE_CHECKING:
    from loraplex.engine.worker.state_pool import PassStates


class AttentionCalls(Protocol):
    """What an attention module calls, once it has attended, in a pass with chunks that ask for something."""

    def attend(
        self, module: nn.Module, query: Tensor, keys: Tensor, values: Tensor, out: Tensor, terms: AttentionTerms
    ) -> None:
        """`query` and `out` [tokens, heads, dim]; `keys` and `values` are all blocks of the module."""
        ...

    def interrupts(self, module: nn.Module) -> bool:
        """Whether some chunk asks for something of an attention module that its layer's compiled call can't do."""
        ...

    def compiled(self, modules: Sequence[nn.Module], apart: Container[int]) -> Sequence[Tensor]:
        """What the compiled call of layers with these attention modules does besides, but for those `apart`."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class BatchImages:
    """What stands in the place of a pass's image tokens."""

    mask: Tensor  # [tokens]  bool
    features: ImageFeatures  # a row for each of the mask's tokens


class InputBatch:
    """The chunks of one pass, single tokens first, and where their keys and values lie."""

    def __init__(self, chunks: Sequence[ScheduledChunk], cache: KeyValueCache, table: BlockTable) -> None:
        # Those that go on from a state first, which run together. Then main passes beside each other: rows of one
        # mixture share the reading of its experts.
        self.chunks = sorted(chunks, key=lambda chunk: (chunk.count, chunk.start == 0, chunk.scaling is not None))
        self.cache = cache
        self.table = table
        self.num_single = sum(chunk.count == 1 for chunk in self.chunks)
        self.last_hidden: Tensor | None = None  # [tokens, hidden], once the pass has run
        # By chunk that wants them: of each mixture of its link [tokens, lora_layers, experts], once they are predicted.
        self.scalings: dict[int, list[Tensor]] = {}
        self.asking = {i: asked for i, chunk in enumerate(self.chunks) if (asked := chunk.asked) is not None}
        self.attention: AttentionCalls | None = None  # what the asking chunks are served by, while the pass runs
        self.stand_in: Callable[..., Tensor] | None = None  # a trial's, in the place of attention
        self.states: PassStates | None = None  # beside keys and values, of models that keep some
        self.layer_by_layer = False  # a trial that looks at what each layer makes
        self.stacked: Any = None  # the stack of layers that the pass is going through
        positions: list[int] = []
        rows: list[int] = []
        tokens: list[int] = []
        self.offsets: list[int] = []  # of each chunk's first token
        for chunk in self.chunks:
            self.offsets.append(len(tokens))
            tokens += chunk.tokens
            positions += range(chunk.start, chunk.stop)
            rows += [chunk.kv.row] * chunk.count
        self.num_tokens = len(tokens)
        device = table.values.device
        self.is_native = native_runs(device, cache.dtype)
        self.token_ids, self.positions, self.rows = torch.tensor([tokens, positions, rows], device=device)
        self.position_ids = self._told_positions()
        self.images: BatchImages | None = None  # where the chunks have image tokens, once they are embedded

    def _told_positions(self) -> Tensor:  # [tokens], or [3, tokens]
        """Positions as the model is told them; three of each token (M-RoPE) where images are in time and space."""
        rotary = [
            None if chunk.images is None else chunk.images.rotary_in(chunk.start, chunk.stop) for chunk in self.chunks
        ]
        if any(own is not None for own in rotary):
            own_or_plain = [
                torch.arange(chunk.start, chunk.stop).expand(3, -1) if own is None else own
                for chunk, own in zip(self.chunks, rotary, strict=True)
            ]
            return torch.cat(own_or_plain, dim=1).to(self.positions.device)
        if any(chunk.offset for chunk in self.chunks):
            offsets = [chunk.offset for chunk in self.chunks for _ in range(chunk.count)]
            return self.positions + torch.tensor(offsets, device=self.positions.device)
        return self.positions

    @cached_property
    def lengths(self) -> Tensor:  # [tokens]
        """Of the sequences, as positions that depend on them are told."""
        lengths = [length for chunk in self.chunks for length in chunk.lengths]
        return torch.tensor(lengths, dtype=torch.int64, device=self.positions.device)

    @cached_property
    def selected(self) -> Tensor | None:  # [logits]
        """The tokens whose logits are wanted; None is all of them."""
        wanted: list[int] = []
        for i, chunk in enumerate(self.chunks):
            wanted += range(self.last_token(i) + 1 - chunk.num_logits, self.last_token(i) + 1)
        return None if len(wanted) == self.num_tokens else torch.tensor(wanted, dtype=torch.int64)

    def kept_scalings(self, i: int) -> list[Tensor]:
        """Of a chunk that wants them, the scalings of each mixture of its link, to be filled."""
        if i not in self.scalings:
            binding = self.chunks[i].sequence.state.binding
            assert binding is not None, "a sequence runs without its adapters"
            self.scalings[i] = [torch.zeros(0)] * len(binding.all_mixtures)
        return self.scalings[i]

    @property
    def num_selected(self) -> int:
        return sum(chunk.num_logits for chunk in self.chunks)

    @property
    def wants_hidden(self) -> bool:
        return any(chunk.wants_hidden for chunk in self.chunks)

    def last_token(self, i: int) -> int:
        """The place of a chunk's last token among all."""
        return self.offsets[i] + self.chunks[i].count - 1

    def prompt_chunks(self) -> Iterator[tuple[int, ScheduledChunk]]:
        """The parts of more than one token, with the place of their first."""
        yield from zip(self.offsets[self.num_single :], self.chunks[self.num_single :], strict=True)

    @property
    def num_chunk_keys(self) -> int:
        """The keys that the tokens of chunks see, counted for each token."""
        return sum(chunk.count * (chunk.start + chunk.stop + 1) // 2 for _, chunk in self.prompt_chunks())

    @cached_property
    def num_key_blocks(self) -> int:
        """How many blocks the longest of the single tokens' sequences reaches into, known without asking the device."""
        longest = max(chunk.stop for chunk in self.chunks[: self.num_single])
        return -(-longest // self.cache.block_tokens)

    @cached_property
    def slots(self) -> tuple[Tensor, Tensor]:  # [tokens] each
        """The block of every token, and its place there."""
        return self.table.slots(self.rows, self.positions, self.cache.block_tokens)


_current: ContextVar[InputBatch | None] = ContextVar("loraplex_packed_batch", default=None)


def current_input_batch() -> InputBatch | None:
    """The packed pass that runs now; None outside of one."""
    return _current.get()


@contextmanager
def forward_context(batch: InputBatch) -> Iterator[None]:
    """Let attention, output layer and decoder see `batch` inside the block."""
    token = _current.set(batch)
    try:
        yield
    finally:
        _current.reset(token)
