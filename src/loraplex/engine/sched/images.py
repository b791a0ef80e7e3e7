"""A request's images: what the vision modules are given, and what of the sequence depends on them."""

from bisect import bisect_left
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from loraplex.engine.kv.sequence_kv import ExtraKey


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageFeatures:
    """What the vision modules made of a request's images, one row for each of its image tokens."""

    embeds: Tensor  # [image tokens, hidden]  in the place of the tokens' embeddings
    # DeepStack (arXiv 2406.04334): what is added to the hidden states behind each of the first decoder layers.
    deepstack: tuple[Tensor, ...] = ()  # [image tokens, hidden] each

    def rows(self, first: int, stop: int) -> "ImageFeatures":
        return ImageFeatures(
            embeds=self.embeds[first:stop], deepstack=tuple(layer[first:stop] for layer in self.deepstack)
        )


@dataclass(eq=False, kw_only=True)
class RequestImages:
    """Kept while the request runs: a sequence that loses its keys and values needs the features again."""

    inputs: Mapping[str, Tensor]  # of the model's `get_image_features`
    indices: tuple[int, ...]  # of the image tokens in the prompt, in order
    keys: tuple[ExtraKey, ...]  # what keys and values depend on from an image on
    rotary: Tensor | None = None  # [3, prompt]  time, height and width of each token (M-RoPE); None: its index alone
    features: dict[Hashable, ImageFeatures] = field(default_factory=dict)  # by the adapters that they went through

    def tokens_in(self, start: int, stop: int) -> tuple[int, int]:
        """Which of the image tokens lie in [start, stop) of the sequence: from the first to behind the last."""
        return bisect_left(self.indices, start), bisect_left(self.indices, stop)

    def rotary_in(self, start: int, stop: int) -> Tensor | None:  # [3, stop - start]
        """The positions of the tokens [start, stop); behind the prompt they count on from the largest one."""
        if self.rotary is None:
            return None
        num_prompt = self.rotary.shape[1]
        behind = torch.arange(max(start, num_prompt), max(stop, num_prompt)) + self._shift
        return torch.cat([self.rotary[:, start:stop], behind.expand(3, -1)], dim=1)

    @property
    def _shift(self) -> int:
        """By how much the position of a new token is behind its index: an image takes fewer positions than tokens."""
        assert self.rotary is not None, "positions that are no others than the indices have no shift"
        return int(self.rotary.max()) + 1 - self.rotary.shape[1]
