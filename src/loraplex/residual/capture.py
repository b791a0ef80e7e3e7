"""Attention capture: what a row asks for, checked against its budget, and the arrays that it gets."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from loraplex.errors import RequestError, TooLargeError
from loraplex.residual.attention_weights import AttentionWeights
from loraplex.residual.steering import check_heads, check_layers

Queries = Literal["all", "generated"] | int
CaptureDtype = Literal["float16", "float32", "float64"]


@dataclass(frozen=True, kw_only=True)
class CaptureRequest:
    """Which attention weights of one row to keep."""

    layers: tuple[int, ...] | None = None  # None is every attention layer
    heads: tuple[int, ...] | None = None  # None is every head
    # "all": every token that is fed. n: the last n tokens of the prompt. "generated": the tokens at which something
    # was generated, from the prompt's last one on, so that query i is what the model looked at for its i-th new token.
    queries: Queries = "all"
    reduce: Literal["mean"] | None = None  # the mean over the heads, instead of each
    dtype: CaptureDtype = "float32"
    budget_bytes: int = 256 * 2**20

    def __post_init__(self) -> None:
        is_count = isinstance(self.queries, int) and not isinstance(self.queries, bool) and self.queries >= 1
        if not (is_count or self.queries in ("all", "generated")):
            raise RequestError(
                f"capture queries={self.queries!r}: give 'all', 'generated', or n for the last n tokens."
            )
        if self.reduce not in (None, "mean"):
            raise RequestError(f"capture reduce={self.reduce!r}: give 'mean' or None.")
        if self.dtype not in get_args(CaptureDtype):
            raise RequestError(f"capture dtype={self.dtype!r}: give one of {list(get_args(CaptureDtype))}.")
        if not isinstance(self.budget_bytes, int) or self.budget_bytes < 1:
            raise RequestError(f"capture budget_bytes={self.budget_bytes!r}: give a whole number of at least 1.")


@dataclass(frozen=True, kw_only=True)
class AttentionCapture:
    """One row's captured attention; padding is left out."""

    weights: np.ndarray  # [layers, heads, queries, keys]; one head where they were reduced
    layers: tuple[int, ...]
    heads: tuple[int, ...] | None  # None: the mean over all or the chosen heads
    query_positions: tuple[int, ...]  # the queries' places among the keys
    key_tokens: tuple[str, ...]
    # [layers, queries]  the length of the sum of the row's residuals; None for a row without residuals
    residual_norms: np.ndarray | None = None

    @property
    def query_tokens(self) -> tuple[str, ...]:
        return tuple(self.key_tokens[position] for position in self.query_positions)

    @property
    def num_bytes(self) -> int:
        return int(self.weights.nbytes)


class CaptureBuffer:
    """Collects one row's weights pass by pass, in memory whose size is checked before the first."""

    def __init__(
        self,
        request: CaptureRequest,
        row: int,
        num_heads: dict[int, int],  # by layer
        *,
        num_padding: int,
        prompt_stop: int,  # keys up to the end of the prompt, padding counted
        fed_before: int,  # tokens that a cache holds already
        max_new_tokens: int,
        has_residuals: bool = False,
    ) -> None:
        self.request = request
        self.layers = check_layers(request.layers, row, num_heads, "capture")
        check_heads(request.heads, row, self.layers, num_heads, "capture")
        self._padding, self._prompt_stop, self._generates = num_padding, prompt_stop, max_new_tokens > 0
        # The last new token is never fed.
        self._stop = prompt_stop + max(0, max_new_tokens - 1)
        self._first = max(num_padding, fed_before, self._first_query(prompt_stop, max_new_tokens))
        self._last = prompt_stop if isinstance(request.queries, int) else self._stop
        self._heads = self._rows_of_heads(row, num_heads)
        shape = (len(self.layers), self._heads, self._last - self._first, self._stop - num_padding)
        self._check_budget(row, shape, norms=has_residuals)
        self._shape, self._has_norms = shape, has_residuals

    @property
    def first_query(self) -> int:
        """The place of the first query that is kept among all tokens that are fed, padding counted."""
        return self._first

    @property
    def num_bytes(self) -> int:
        """Of the weights, at most."""
        return int(np.prod(self._shape, dtype=np.int64)) * getattr(torch, self.request.dtype).itemsize

    # Taken when the first weights come: a request may wait for long before that.
    @cached_property
    def _kept(self) -> Tensor:  # [layers, heads, queries, keys]
        return torch.zeros(self._shape, dtype=getattr(torch, self.request.dtype))

    @cached_property
    def _norms(self) -> Tensor | None:  # [layers, queries]
        return torch.zeros(self._shape[0], self._shape[2]) if self._has_norms else None

    def keep(self, layer: int, weights: AttentionWeights, place: int) -> None:
        """Take what is wanted of one layer's pass; `place` is the row's place among the weights' rows."""
        first_key, first_query = weights.first_key, weights.first_query
        start, stop = max(self._first, first_query), min(self._last, first_query + weights.num_queries)
        if start >= stop:
            return
        chosen = weights.queries(start - first_query, stop - first_query, place).detach()
        if self.request.heads is not None:
            chosen = chosen[list(self.request.heads)]
        if self.request.reduce == "mean":
            chosen = chosen.mean(dim=0, keepdim=True)
        first = max(0, self._padding - first_key)
        queries = slice(start - self._first, stop - self._first)
        keys = slice(first_key + first - self._padding, first_key + weights.num_keys - self._padding)
        self._kept[self.layers.index(layer), :, queries, keys] = chosen[:, :, first:].to(self._kept)

    def keep_norms(self, layer: int, norms: Tensor, first_query: int) -> None:  # [tokens]
        """Take the lengths of one layer's residuals in one pass."""
        start, stop = max(self._first, first_query), min(self._last, first_query + norms.numel())
        if self._norms is not None and start < stop:
            kept = norms[start - first_query : stop - first_query].detach().to(self._norms)
            self._norms[self.layers.index(layer), start - self._first : stop - self._first] = kept

    def num_fed(self, ids: Sequence[int], ends: Sequence[int]) -> int:
        """How many of a row's ids (padding left out) were fed until it ended: all but the last that it generated."""
        prompt = self._prompt_stop - self._padding
        for place in range(prompt, len(ids)):
            if ids[place] in ends:
                return place
        return len(ids) - 1 if self._generates else len(ids)

    def result(self, ids: Sequence[int], tokens: Sequence[str]) -> AttentionCapture:
        """The capture of a row that was fed `ids` in all, padding left out, of which `tokens` are the texts."""
        num_keys = len(ids)
        first = self._first - self._padding
        stop = max(first, min(self._last - self._padding, num_keys))
        reduced = self.request.reduce == "mean"
        return AttentionCapture(
            weights=self._kept[:, :, : stop - first, :num_keys].contiguous().numpy(),
            layers=self.layers,
            heads=None if reduced else self.request.heads or tuple(range(self._heads)),
            query_positions=tuple(range(first, stop)),
            key_tokens=tuple(tokens),
            residual_norms=None if self._norms is None else self._norms[:, : stop - first].contiguous().numpy(),
        )

    def _first_query(self, prompt_stop: int, max_new_tokens: int) -> int:
        queries = self.request.queries
        if queries == "all":
            return 0
        if queries == "generated":
            if max_new_tokens == 0:
                raise RequestError(
                    "a capture of 'generated' needs generation, but a forward pass generates nothing. Ask for 'all' or "
                    "for the last n tokens."
                )
            return prompt_stop - 1
        return prompt_stop - int(queries)

    def _rows_of_heads(self, row: int, num_heads: dict[int, int]) -> int:
        if self.request.reduce == "mean":
            return 1
        if self.request.heads is not None:
            return len(self.request.heads)
        counts = {num_heads[layer] for layer in self.layers}
        if len(counts) > 1:
            raise RequestError(
                f"row {row}: the layers {list(self.layers)} have different numbers of heads ({sorted(counts)}), which "
                "make no array. Name the heads, ask for reduce='mean', or capture these layers in separate requests."
            )
        return counts.pop()

    def _check_budget(self, row: int, shape: tuple[int, ...], *, norms: bool) -> None:
        needed = int(np.prod(shape, dtype=np.int64)) * getattr(torch, self.request.dtype).itemsize
        needed += 4 * shape[0] * shape[2] if norms else 0
        if needed > self.request.budget_bytes:
            layers, heads, queries, keys = shape
            raise TooLargeError(
                f"row {row}: its capture may take {needed} bytes ({layers} layers x {heads} heads x {queries} queries "
                f"x {keys} keys in {self.request.dtype}), and its budget_bytes is {self.request.budget_bytes}. Ask for "
                "fewer layers, heads or queries, for reduce='mean' or dtype='float16', or raise budget_bytes."
            )
