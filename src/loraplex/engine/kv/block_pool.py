"""Blocks of keys and values: who holds them, which can be shared, which goes when room is needed."""

from collections import OrderedDict

import torch
from torch import Tensor


class BlockPool:
    """Numbered blocks with reference counts. A block that nobody holds stays until its room is needed, oldest first."""

    def __init__(self, num_blocks: int, block_tokens: int) -> None:
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self._free = list(range(num_blocks - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # held by nobody, but their contents are known
        self._holders = [0] * num_blocks
        self._key_of: dict[int, bytes] = {}
        self._by_key: dict[bytes, int] = {}

    @property
    def num_available(self) -> int:
        """Blocks that can be taken now."""
        return len(self._free) + len(self._idle)

    @property
    def num_held(self) -> int:
        return self.num_blocks - self.num_available

    def allocate(self) -> int:
        """A block for new contents."""
        if self._free:
            block = self._free.pop()
        else:
            assert self._idle, "a block was taken though none is available"
            block, _ = self._idle.popitem(last=False)
            self._forget(block)
        self._holders[block] = 1
        return block

    def get_cached_block(self, key: bytes) -> int | None:
        """The block with these contents, if it is still there; it isn't held yet."""
        return self._by_key.get(key)

    def touch(self, block: int) -> None:
        """Share a block that `get_cached_block` gave."""
        if self._holders[block] == 0:
            del self._idle[block]
        self._holders[block] += 1

    def free(self, block: int) -> None:
        """Hold a block no longer."""
        self._holders[block] -= 1
        assert self._holders[block] >= 0, f"block {block} was left more often than held"
        if self._holders[block] > 0:
            return
        if block in self._key_of:
            self._idle[block] = None
        else:
            self._free.append(block)

    def cache_full_block(self, block: int, key: bytes) -> None:
        """Make a full block's contents known under `key`, unless another block has them."""
        if key not in self._by_key:
            self._by_key[key] = block
            self._key_of[block] = key

    def forget_all_idle(self) -> None:
        """Empty the prefix cache; what is held stays known."""
        for block in self._idle:
            self._forget(block)
            self._free.append(block)
        self._idle.clear()

    def _forget(self, block: int) -> None:
        key = self._key_of.pop(block, None)
        if key is not None:
            del self._by_key[key]


class BlockTable:
    """The blocks of every sequence, one row each, as the attention kernels read them."""

    def __init__(self, num_rows: int, row_blocks: int, device: torch.device, *, grows: bool = True) -> None:
        self.row_blocks = row_blocks
        self.grows = grows  # False: sequences keep more than blocks in their rows, and there is memory for so many
        self.values = torch.zeros(num_rows, row_blocks, dtype=torch.int32, device=device)
        self._free = list(range(num_rows - 1, -1, -1))

    def has_rows(self, num_sequences: int) -> bool:
        """Whether so many more sequences can begin now."""
        return self.grows or num_sequences <= len(self._free)

    def take_row(self) -> int:
        if not self._free:
            assert self.grows, "a sequence began though no row was free"
            num_rows = self.values.shape[0]
            with torch.inference_mode(False):  # also in a trial: it is written to outside of one, too
                self.values = torch.cat([self.values, torch.zeros_like(self.values)])
            self._free = list(range(2 * num_rows - 1, num_rows - 1, -1))
        return self._free.pop()

    def leave_row(self, row: int) -> None:
        self._free.append(row)

    def set(self, row: int, first: int, blocks: list[int]) -> None:
        """Write a row's blocks from its block number `first` on."""
        self.values[row, first : first + len(blocks)] = torch.tensor(blocks, dtype=torch.int32)

    @property
    def num_rows_held(self) -> int:
        return self.values.shape[0] - len(self._free)

    def slots(self, rows: Tensor, positions: Tensor, block_tokens: int) -> tuple[Tensor, Tensor]:
        """Block and place inside it of tokens [tokens] at `positions` of `rows`."""
        return self.values[rows, positions // block_tokens].long(), positions % block_tokens
