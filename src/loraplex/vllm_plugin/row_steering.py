"""A request's steering as one worker's heads have it: made once, as its spans lie in the prompt."""

from collections.abc import Sequence

import torch
from torch import Tensor

from loraplex.residual.steering import KeyShare, Steering, log_strengths


class RowSteering:
    """What steering adds to logits, and the shares that keys get, by layer."""

    def __init__(self, steerings: Sequence[Steering], num_heads: int, heads: slice) -> None:
        """`num_heads` of a layer, of which this worker has `heads`."""
        self._steerings, self._num_heads, self._heads = tuple(steerings), num_heads, heads
        self._strengths: dict[tuple[Steering, ...], Tensor] = {}  # [1, heads or 1, keys up to the last span's end]

    def reaches(self, layer: int) -> bool:
        """Whether it changes anything at a layer."""
        return any(steering.reaches(layer) for steering in self._steerings)

    def log_strength(self, layer: int, num_keys: int) -> Tensor | None:  # [1, heads or 1, keys]
        """What is added to the logits of a layer's first keys; None: nothing."""
        factors = tuple(one for one in self._steerings if one.share is None and one.reaches(layer))
        if not factors:
            return None
        if factors not in self._strengths:
            self._strengths[factors] = self._make(factors)
        known = self._strengths[factors]
        missing = num_keys - known.shape[2]
        return known[:, :, :num_keys] if missing <= 0 else torch.nn.functional.pad(known, (0, missing))

    def shares(self, layer: int, num_keys: int) -> list[KeyShare]:
        """The shares of a layer's first keys, in their order."""
        found = []
        for one in self._steerings:
            if one.share is None or not one.reaches(layer):
                continue
            heads = None if one.heads is None else tuple(own for h in one.heads if (own := self._own(h)) is not None)
            if heads != ():
                found.append(KeyShare(0, one.meant(0, num_keys), heads, one.share))
        return found

    def _make(self, factors: Sequence[Steering]) -> Tensor:
        num_keys = max(stop for steering in factors for _, stop in steering.spans)
        is_whole = all(steering.heads is None for steering in factors)
        num_heads = 1 if is_whole else self._num_heads
        strengths = log_strengths([(0, factors, 0)], 1, num_heads, 0, num_keys, torch.device("cpu"))
        return strengths if is_whole else strengths[:, self._heads].clone()

    def _own(self, head: int) -> int | None:
        """A head's number among this worker's; None of another's."""
        return head - self._heads.start if self._heads.start <= head < self._heads.stop else None
