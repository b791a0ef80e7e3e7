"""u of linked residuals for all sequences: rank numbers a token, in the blocks of the token's keys and values.

So u is shared, kept while a sequence is paused, evicted and computed again as they are: the chain of hashes that a
block is known by has the residuals in it.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from loraplex.residual.cache import Key

_WIDTH = 8  # numbers of one token in one tensor; a larger rank has several


class ResidualCache:
    """By attention layer and place in the link, tensors [blocks, block_tokens, 8], made when they are first needed."""

    def __init__(self, num_blocks: int, block_tokens: int, device: torch.device) -> None:
        self._shape = (num_blocks, block_tokens, _WIDTH)
        self._device = device
        self._tensors: dict[Key, list[Tensor]] = {}
        self.num_cleared = 0  # how often memory was given back: what was told of it is worth nothing then

    def parts(self, key: Key, rank: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """The tensors that hold u of a rank."""
        tensors = self._tensors.setdefault(key, [])
        while len(tensors) * _WIDTH < rank:  # not zeroed, as keys and values: memory is given to what is written
            tensors.append(torch.empty(self._shape, dtype=dtype, device=self._device))
        return tensors[: -(-rank // _WIDTH)]

    def write(self, key: Key, blocks: Tensor, places: Tensor, u: Tensor) -> None:
        """Keep u [rows, tokens, rank] of the tokens at `places` of `blocks` [rows, tokens]."""
        tensors = self.parts(key, u.shape[2], u.dtype)
        for tensor, part in zip(tensors, u.split(_WIDTH, dim=2), strict=True):
            tensor[blocks, places, : part.shape[2]] = part.to(tensor.dtype)

    def read(self, key: Key, blocks: Tensor, rank: int) -> Tensor:  # [rows, tokens, rank]
        """u in whole blocks [rows, blocks]; what was never written may be anything."""
        parts = [tensor[blocks].flatten(1, 2) for tensor in self._tensors[key][: -(-rank // _WIDTH)]]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=2))[:, :, :rank]

    def clear(self) -> None:
        """Give the memory back; nothing that was kept is needed any more."""
        self._tensors.clear()
        self.num_cleared += 1

    @property
    def num_bytes(self) -> int:
        """Of all tensors, touched or not."""
        return sum(tensor.nbytes for tensors in self._tensors.values() for tensor in tensors)


class BlockStates:
    """u of some rows whose tokens lie in blocks: `ResidualStates` of one pass."""

    def __init__(
        self,
        cache: ResidualCache,
        slots: tuple[Tensor, Tensor],  # [rows, tokens] each: the new tokens' blocks, and their places there
        table: Tensor,  # [rows, blocks]  each row's, as far as the longest reaches
        counts: Tensor,  # [rows]  tokens, with the new ones
        num_keys: int,  # the largest count
        ranks: Callable[[Key, torch.device], Tensor],  # [rows]  of each row's residual; 0 without one
    ) -> None:
        self._cache, self._slots, self._table = cache, slots, table
        self._counts, self._num_keys, self._ranks = counts, num_keys, ranks

    def extend(self, key: Key, sequences: Tensor, u: Tensor) -> Tensor:  # [rows, keys, rank]
        """Keep the new tokens' u [rows, tokens, rank] of `sequences`, and return that of all keys."""
        blocks, places = (where[sequences] for where in self._slots)
        self._cache.write(key, blocks, places, u)
        kept = self._cache.read(key, self._table[sequences], u.shape[2])[:, : self._num_keys]
        if len(self._table) == 1:
            return kept
        # Shorter sequences and smaller ranks end where memory may hold anything.
        written = torch.arange(self._num_keys, device=u.device) < self._counts[sequences].unsqueeze(1)
        own = torch.arange(u.shape[2], device=u.device) < self._ranks(key, u.device)[sequences].unsqueeze(1)
        return kept.masked_fill(~(written.unsqueeze(2) & own.unsqueeze(1)), 0)
