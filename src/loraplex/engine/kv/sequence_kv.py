"""One pass of one sequence: how far it has come, and the blocks that hold its keys and values."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from loraplex.engine.kv.block_pool import BlockPool, BlockTable
from loraplex.routing.token_router import TokenRouter


@dataclass(frozen=True, kw_only=True)
class SequenceRoute:
    """One adapter that a sequence's tokens go through."""

    slot: int
    weight: float = 1.0
    active_from: int | None = None  # aLoRA: the position from which on it is active; None: from the first
    use: int | None = None  # an expert's: the place of its mixture among those of the sequence
    expert: int = 0  # and its place in the mixture
    router: TokenRouter | None = None  # of a mixture that gates its experts in each layer
    mixture: int = 0  # and the place of that mixture among all of the sequence's


@dataclass(frozen=True, kw_only=True)
class ExtraKey:
    """Something that keys and values depend on besides the tokens, from a position on."""

    identity: tuple[object, ...]
    active_from: int | None = None


class SequenceKV:
    """The main pass of a sequence, or one of its scaling passes."""

    def __init__(
        self,
        tokens: list[int],  # the sequence's own list, which grows
        routes: Sequence[SequenceRoute],
        key_parts: Sequence[ExtraKey],
        pool: BlockPool,
        table: BlockTable,
    ) -> None:
        self.tokens = tokens
        self.routes = tuple(routes)
        self.blocks: list[int] = []
        self.num_computed = 0
        self.row = table.take_row()
        self._key_parts = tuple(key_parts)
        self._pool = pool
        self._table = table
        self._keys: list[bytes] = []
        self._num_named = 0

    def keys(self, num_tokens: int) -> list[bytes]:
        """The keys of the full blocks among the first `num_tokens` tokens: each stands for all tokens up to it."""
        size = self._pool.block_tokens
        while len(self._keys) < num_tokens // size:
            start = len(self._keys) * size
            parts = [
                (part.identity, part.active_from)
                for part in self._key_parts
                if part.active_from is None or part.active_from < start + size
            ]
            digest = hashlib.blake2b(self._keys[-1] if self._keys else b"", digest_size=16)
            digest.update(repr((self.tokens[start : start + size], parts)).encode())
            self._keys.append(digest.digest())
        return self._keys[: num_tokens // size]

    def reuse(self, most: int) -> None:
        """Begin with what is known of the first `most` tokens."""
        assert not self.blocks, "a sequence that has blocks can't begin"
        for key in self.keys(most):
            block = self._pool.get_cached_block(key)
            if block is None:
                break
            self._pool.touch(block)
            self.blocks.append(block)
        self._num_named = len(self.blocks)
        self.num_computed = len(self.blocks) * self._pool.block_tokens
        self._table.set(self.row, 0, self.blocks)

    def blocks_missing(self, num_tokens: int) -> int:
        """How many more blocks `num_tokens` tokens need."""
        return max(0, -(-num_tokens // self._pool.block_tokens) - len(self.blocks))

    def grow(self, num_tokens: int) -> None:
        """Take the blocks that `num_tokens` tokens need."""
        new = [self._pool.allocate() for _ in range(self.blocks_missing(num_tokens))]
        if new:
            self._table.set(self.row, len(self.blocks), new)
            self.blocks += new

    def cache_full_blocks(self, num_tokens: int) -> None:
        """Make the full blocks known whose tokens are computed and among the first `num_tokens`, which are certain."""
        full = min(self.num_computed, num_tokens) // self._pool.block_tokens
        if full > self._num_named:
            for number, key in enumerate(self.keys(full * self._pool.block_tokens)[self._num_named :], self._num_named):
                self._pool.cache_full_block(self.blocks[number], key)
            self._num_named = full

    def drop(self) -> None:
        """Give all blocks back; the sequence starts anew."""
        for block in reversed(self.blocks):  # the end of a prefix is evicted before its beginning
            self._pool.free(block)
        self.blocks = []
        self.num_computed = self._num_named = 0

    def close(self) -> None:
        self.drop()
        self._table.leave_row(self.row)


@dataclass(frozen=True, kw_only=True)
class LengthRule:
    """When positions change with the length of a sequence, and what of it keys and values depend on."""

    threshold: int | None = None  # tokens, from which on they do; None: never
    is_step: bool = True  # they change there once; else with every further token
    # `generate` computes the whole sequence anew in the step in which it outgrows the threshold (Phi-3).
    begins_anew: bool = False

    def first_length(self, num_prompt: int, num_tokens: int) -> int:
        """The length in the first pass of a sequence that has `num_tokens` now."""
        outgrown = self.begins_anew and self.threshold is not None and num_prompt <= self.threshold < num_tokens
        return num_tokens if outgrown else num_prompt

    def keys(self, first_length: int) -> list[ExtraKey]:
        """What keys and values depend on besides the tokens."""
        if self.threshold is None or first_length <= self.threshold:
            return []
        return [ExtraKey(identity=("length", 0 if self.is_step else first_length))]
