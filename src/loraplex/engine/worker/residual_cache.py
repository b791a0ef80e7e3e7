"""u of linked residuals for all sequences: rank numbers a token, in the blocks of the token's keys and values.

So u is shared, kept while a sequence is paused, evicted and computed again as they are: the chain of hashes that a
block is known by has the residuals in it.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from loraplex.engine.worker.input_batch import InputBatch
from loraplex.residual.cache import Key

_WIDTH = 8  # numbers of one token in one tensor; a larger rank has several


class ResidualCache:
    """By attention layer and place in the link, tensors [blocks, block_tokens, 8], made when they are first needed."""

    def __init__(self, num_blocks: int, block_tokens: int, device: torch.device) -> None:
        self._shape = (num_blocks, block_tokens, _WIDTH)
        self._device = device
        self._tensors: dict[Key, list[Tensor]] = {}

    def write(self, key: Key, blocks: Tensor, places: Tensor, u: Tensor) -> None:
        """Keep u [rows, tokens, rank] of the tokens at `places` of `blocks` [rows, tokens]."""
        tensors = self._tensors.setdefault(key, [])
        for number, part in enumerate(u.split(_WIDTH, dim=2)):
            if number == len(tensors):  # not zeroed, as keys and values: memory is given to what is written
                tensors.append(torch.empty(self._shape, dtype=u.dtype, device=self._device))
            tensors[number][blocks, places, : part.shape[2]] = part.to(tensors[number].dtype)

    def read(self, key: Key, blocks: Tensor, rank: int) -> Tensor:  # [rows, tokens, rank]
        """u in whole blocks [rows, blocks]; what was never written may be anything."""
        parts = [tensor[blocks].flatten(1, 2) for tensor in self._tensors[key][: -(-rank // _WIDTH)]]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=2))[:, :, :rank]

    def clear(self) -> None:
        """Give the memory back; nothing that was kept is needed any more."""
        self._tensors.clear()

    @property
    def num_bytes(self) -> int:
        """Of all tensors, touched or not."""
        return sum(tensor.nbytes for tensors in self._tensors.values() for tensor in tensors)


class GroupResidualCache:
    """u of some rows of a packed pass that stand side by side, as a chain of residuals extends it."""

    def __init__(
        self,
        pool: ResidualCache,
        batch: InputBatch,
        tokens: Tensor,  # [rows, count]  places in the batch
        num_keys: int,  # of the longest row
        ranks: Callable[
            [Key, torch.device], Tensor
        ],  # [rows]  of each row's residual at a layer and place; 0 without one
    ) -> None:
        self._pool, self._batch, self._tokens = pool, batch, tokens
        self._num_keys, self._ranks = num_keys, ranks

    def extend(self, key: Key, sequences: Tensor, u: Tensor) -> Tensor:  # [rows, keys, rank]
        """Keep the new tokens' u [rows, count, rank] of `sequences`, and return that of all keys."""
        tokens = self._tokens[sequences]
        blocks, places = (where[tokens] for where in self._batch.slots)
        self._pool.write(key, blocks, places, u)
        num_blocks = -(-self._num_keys // self._batch.cache.block_tokens)
        table = self._batch.table.values[self._batch.rows[tokens[:, 0]], :num_blocks].long()
        kept = self._pool.read(key, table, u.shape[2])[:, : self._num_keys]
        if self._tokens.shape[0] == 1:
            return kept
        # Shorter sequences and smaller ranks end where memory may hold anything.
        written = torch.arange(self._num_keys, device=u.device) <= self._batch.positions[tokens[:, -1:]]
        own = torch.arange(u.shape[2], device=u.device) < self._ranks(key, u.device)[sequences].unsqueeze(1)
        return kept.masked_fill(~(written.unsqueeze(2) & own.unsqueeze(1)), 0)
