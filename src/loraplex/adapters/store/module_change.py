"""What an adapter changes about a module's own weights, as its output takes it."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

Product = Callable[[Tensor, Tensor], Tensor]  # x [n, in], weight [out, in] -> [n, out]  float32, or wider


class ModuleChange(Protocol):
    """One adapter's share of one module."""

    @property
    def num_bytes(self) -> int:
        """Of its tensors."""
        ...

    @property
    def size(self) -> int | None:
        """How many tokens the embedding or the output layer has with it; None: as many as the base's."""
        ...

    def to(self, device: torch.device) -> "ModuleChange":
        """The same on a device."""
        ...

    def add(
        self,
        y: Tensor,  # [n, out]  the module's output, changed in place
        x: Tensor,  # [n, in]; [n] ids of an embedding
        gate: float | Tensor,  # or [n]
        product: Product,
    ) -> None:
        """Add `gate` times what the adapter's weights give and the base's don't."""
        ...
