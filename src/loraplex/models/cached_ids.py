"""The tokens whose keys and values are in a cache that `forward` returned: an aLoRA's invocation may be among them."""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from loraplex.layers.passes import cached_length


class CachedIds:
    """The token ids of caches, as long as somebody has the cache."""

    def __init__(self) -> None:
        self._ids: WeakKeyDictionary[Any, Tensor] = WeakKeyDictionary()

    def of(self, cache: Any, num_rows: int) -> Tensor | None:  # [rows, tokens]
        """What is in the cache; None where that isn't known."""
        length = cached_length(cache)
        if length is None:
            return None
        known = self._ids.get(cache)
        if known is None or len(known) != num_rows or known.shape[1] < length:
            return None
        return known[:, :length]  # it may have been cropped

    def forget(self, cache: Any) -> None:
        """What is in the cache from now on is not known."""
        if cached_length(cache) is not None:
            self._ids.pop(cache, None)

    def note(self, cache: Any, before: Tensor | None, new: Tensor) -> None:
        """Remember what is in a cache after a pass of `new` on top of `before`, which is None if that isn't known."""
        length = cached_length(cache)
        if length is None:
            return
        ids = new.detach() if before is None else torch.cat([before, new.detach()], dim=1)
        if ids.shape[1] == length:
            self._ids[cache] = ids.clone()
        else:
            self._ids.pop(cache, None)
