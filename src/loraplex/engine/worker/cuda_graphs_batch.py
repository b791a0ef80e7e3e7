"""A packed batch of single tokens whose tensors keep their places and sizes; rows beyond a pass's own are padding."""

from functools import cached_property

import torch
from torch import Tensor

from loraplex.engine.kv.block_pool import BlockTable
from loraplex.engine.kv.kv_cache import KeyValueCache
from loraplex.engine.worker.input_batch import InputBatch


class StaticBatch(InputBatch):
    """`size` single tokens over up to `num_key_blocks` blocks each.

    A padding row is token 0 at position 0 of the cache's null block, which no sequence has: it writes its keys and
    values there, sees only them, and its results are not looked at.
    """

    def __init__(self, size: int, num_key_blocks: int, cache: KeyValueCache, like: InputBatch) -> None:
        super().__init__([], cache, BlockTable(size, num_key_blocks, like.table.values.device))
        self.num_single = self.num_tokens = size
        self.num_key_blocks = num_key_blocks
        device = self.table.values.device
        self._inputs = torch.zeros(3, size, dtype=torch.int64, device=device)
        self.token_ids, self.positions, self.lengths = self._inputs
        self.position_ids = self.positions
        self.rows = torch.arange(size, device=device)

    def fill(self, batch: InputBatch) -> None:
        """Take over the tokens of a pass, and the blocks of their sequences."""
        num_tokens, values = batch.num_tokens, self.table.values
        self._inputs[0, :num_tokens], self._inputs[1, :num_tokens] = batch.token_ids, batch.positions
        self._inputs[2, :num_tokens] = batch.lengths
        self._inputs[:, num_tokens:] = 0
        values[:num_tokens] = batch.table.values[batch.rows, : self.num_key_blocks]
        values[num_tokens:] = self.cache.null_block

    def begin(self) -> None:
        """Forget what was derived from the last contents."""
        self.__dict__.pop("slots", None)
        self.last_hidden = None

    @cached_property
    def selected(self) -> Tensor | None:
        return None

    @property
    def num_selected(self) -> int:
        return self.num_tokens

    @property
    def wants_hidden(self) -> bool:
        return True
