"""The gates of all tokens so far, for modules that see what is in the cache (multi-head latent attention)."""

from collections.abc import Sequence

import torch
from torch import Tensor


class GateHistory:
    """Lies beside a cache of both passes, as one of its followers."""

    def __init__(self, column_rows: Sequence[int]) -> None:
        self._column_rows = torch.tensor(column_rows)  # the batch row of each column
        self.values: Tensor | None = None  # [modules, columns, copies, tokens]

    def append(self, gates: Tensor) -> Tensor:  # [modules, columns, copies, new tokens]
        """Add a pass's gates; returns those of all tokens."""
        self.values = gates if self.values is None else torch.cat([self.values, gates], dim=-1)
        return self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:  # [main sequences]
        """Let every sequence take over another of its batch row."""
        if self.values is None:
            return
        copies = self.values.shape[2]
        own = beam_idx.to(self.values.device).view(-1, copies) % copies  # [rows, copies]
        taken = own[self._column_rows.to(own.device)]  # [columns, copies]
        self.values = self.values.gather(2, taken[None, :, :, None].expand_as(self.values))

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens."""
        if self.values is not None and tokens_to_remove != 0:
            self.values = self.values[..., : self.values.shape[-1] - abs(tokens_to_remove)]
