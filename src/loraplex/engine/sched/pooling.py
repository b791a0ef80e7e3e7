"""The last hidden states of a prompt as one vector, gathered while its chunks run."""

import torch
from torch import Tensor

from loraplex.engine.request import Pooling


class PooledPrompt:
    """What one sequence's passes have shown of its prompt; passes that run tokens again count once."""

    def __init__(self, pooling: Pooling) -> None:
        self.pooling = pooling
        self.num_seen = 0  # tokens whose hidden states are in the sum
        self._sum: Tensor | None = None  # [hidden], float64
        self._last: Tensor | None = None  # [hidden]

    def most_reused(self, num_tokens: int) -> int:
        """How many of the first tokens may come from the prefix cache: a mean needs each token's own state."""
        return num_tokens if self.pooling == "last" else min(num_tokens, self.num_seen)

    def saw(self, start: int, hidden: Tensor) -> None:  # [count, hidden]
        """A main pass has run the tokens from `start` on."""
        self._last = hidden[-1].float().cpu()
        if self.pooling == "mean" and start + len(hidden) > self.num_seen:
            new = hidden[max(0, self.num_seen - start) :].to(torch.float64).sum(dim=0).cpu()
            self._sum = new if self._sum is None else self._sum + new
            self.num_seen = start + len(hidden)

    def pooled(self) -> Tensor | None:  # [hidden]
        """The vector of what was seen, in float32; None if nothing ran."""
        if self.pooling == "last" or self._sum is None:
            return self._last
        return (self._sum / self.num_seen).float()
