"""Attention weights of chosen rows, computed beside the fast attention that serves all rows."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from loraplex.layers.attention.interface import causal_mask
from loraplex.residual.steering import KeyShare

# Weights of more bytes are computed in parts, a range of queries at a time, and not kept.
KEPT_BYTES = 64 * 2**20


class AttentionWeights:
    """softmax(cap(q k^T * scaling) + log strength) over the keys that the mask shows, in float32 at least.

    Where keys are to get a share, weights are then multiplied so that they do.

    Nothing is computed before it is asked for. A query that sees no key (padding) has weights 0, as in torch's fused
    attention.
    """

    def __init__(
        self,
        query: Tensor,  # [sequences, heads, queries, head_dim]
        key: Tensor,  # [sequences, kv_heads, keys, head_dim]
        mask: Tensor | None,  # [sequences or 1, heads or 1, queries, keys]; True or 0 shows a key
        *,
        sequences: Tensor,  # [rows] which sequences, ascending
        scaling: float,
        softcap: float | None,
        is_causal: bool,
        position_bias: Tensor | None = None,  # [sequences or 1, heads, queries, keys]
        log_strength: Tensor | None = None,  # [rows, heads, keys]; -inf masks
        shares: Sequence[KeyShare] = (),
        first_key: int = 0,  # place of the first key among all tokens that were fed; a window forgets the earlier ones
    ) -> None:
        self.first_key = first_key
        self._query, self._key, self._dtype = query, key, query.dtype
        self.sequences, self._scaling, self._softcap = sequences, scaling, softcap
        self.num_queries, self.num_keys = query.shape[2], key.shape[2]
        self.num_rows = sequences.numel()
        self._mask = causal_mask(query, key) if mask is None and is_causal and self.num_queries > 1 else mask
        self._position_bias, self._log_strength = position_bias, log_strength
        self._shares = shares
        self._kept: Tensor | None = None
        self._selected = False

    @property
    def first_query(self) -> int:
        """The place of the first query among all tokens that were fed."""
        return self.first_key + self.num_keys - self.num_queries

    def apply(self, values: Tensor, index: Tensor | None = None) -> Tensor:  # [rows, heads, queries, dim]
        """sum_s w[.., s] values[.., s]; values [rows, kv_heads, keys, dim] of all rows or of those in `index`."""
        parts = []
        for weights in self._parts():
            chosen = weights if index is None else weights[index]
            rows, heads, queries, keys = chosen.shape
            grouped = chosen.reshape(rows, values.shape[1], -1, keys)  # heads that share values stand together
            product = grouped @ values.to(chosen.dtype)
            parts.append(product.reshape(rows, heads, queries, -1))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def queries(self, start: int, stop: int, row: int) -> Tensor:  # [heads, stop - start, keys]
        """The weights of some queries of one row."""
        if self._fits():
            return self._whole()[row, :, start:stop]
        return self._compute(start, stop, row)[0]

    def _parts(self) -> Iterator[Tensor]:
        if self._fits():
            yield self._whole()
            return
        step = max(1, KEPT_BYTES * self.num_queries // self._num_bytes)
        for start in range(0, self.num_queries, step):
            yield self._compute(start, min(start + step, self.num_queries))

    @property
    def _num_bytes(self) -> int:
        return 4 * self.num_rows * self._query.shape[1] * self.num_queries * self.num_keys

    def _fits(self) -> bool:
        return self._num_bytes <= KEPT_BYTES

    def _whole(self) -> Tensor:
        if self._kept is None:
            self._kept = self._compute(0, self.num_queries)
        return self._kept

    def _select(self) -> None:
        if self._selected:
            return
        dtype = torch.promote_types(self._query.dtype, torch.float32)
        self._query, self._key = self._of_rows(self._query).to(dtype), self._of_rows(self._key).to(dtype)
        self._mask = None if self._mask is None else self._of_rows(self._mask)
        self._position_bias = None if self._position_bias is None else self._of_rows(self._position_bias)
        self._selected = True

    def _of_rows(self, tensor: Tensor) -> Tensor:
        return tensor if tensor.shape[0] in (1, self.num_rows) else tensor[self.sequences]

    def _compute(self, start: int, stop: int, row: int | None = None) -> Tensor:  # [rows, heads, queries, keys]
        weights = self._without_shares(start, stop, row)
        first = 0 if row is None else row
        for share in self._shares:
            if first <= share.place < first + len(weights):
                own = weights[share.place - first]
                own *= share.factors(own)
        return weights

    def _without_shares(self, start: int, stop: int, row: int | None = None) -> Tensor:  # [rows, heads, queries, keys]
        self._select()
        rows = slice(None) if row is None else slice(row, row + 1)
        query, key = self._query[rows, :, start:stop], self._key[rows]
        num_rows, heads, num_queries, head_dim = query.shape
        grouped = (query * self._scaling).reshape(num_rows, key.shape[1], -1, head_dim)
        logits = (grouped @ key.transpose(2, 3)).reshape(num_rows, heads, num_queries, -1)
        if self._softcap is not None:
            logits = torch.tanh(logits / self._softcap) * self._softcap
        if self._position_bias is not None:
            logits = logits + _rows(self._position_bias, rows)[:, :, start:stop]
        shown, added = self._terms(rows, slice(start, stop))
        if added is not None:
            logits = logits + added.to(logits.dtype)
        if shown is None:
            return torch.softmax(logits, dim=-1)
        hidden = ~shown
        weights = torch.softmax(logits.masked_fill(hidden, torch.finfo(logits.dtype).min), dim=-1)
        return weights.masked_fill(hidden, 0)  # only of queries that see nothing, whose softmax is uniform

    def steered_mask(self, places: Tensor) -> Tensor:  # [rows, heads, queries, keys]
        """Mask and strengths of some rows in one mask, as attention functions take it.

        Where strengths only mute, it is boolean if the base's is: then the result is that of a base mask to the bit.
        """
        dtype = self._dtype if self._mask is None or self._mask.dtype == torch.bool else self._mask.dtype
        boolean = self._mask is None or self._mask.dtype == torch.bool
        self._select()
        shown, added = self._terms(slice(None), slice(None))
        assert shown is not None, "a steered row has strengths"
        assert added is not None, "a steered row has strengths"
        if self._shares:
            added = added.expand(self.num_rows, self._query.shape[1], self.num_queries, self.num_keys).clone()
            weights = self._without_shares(0, self.num_queries)
            for share in self._shares:
                factors = share.factors(weights[share.place])
                weights[share.place] *= factors
                added[share.place] += factors.log()
        shape = (self.num_rows, added.shape[1], self.num_queries, self.num_keys)
        shown, added = shown.expand(shape)[places], added.expand(shape)[places]
        if boolean and not bool(added.any()):
            return shown
        return added.to(dtype).masked_fill(~shown, torch.finfo(dtype).min)

    def _terms(self, rows: slice, queries: slice) -> tuple[Tensor | None, Tensor | None]:
        """Which keys are shown, and what is added to their logits; both broadcast to [rows, heads, queries, keys]."""
        shown: Tensor | None = None
        added: Tensor | None = None
        if self._mask is not None:
            mask = _rows(self._mask, rows)[:, :, queries]
            shown = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
            added = None if mask.dtype == torch.bool else mask.masked_fill(~shown, 0)
        if self._log_strength is not None:
            strength = self._log_strength[rows].unsqueeze(2)
            audible = strength > -torch.inf
            strength = strength.masked_fill(~audible, 0)
            shown = audible if shown is None else shown & audible
            added = strength if added is None else added + strength
        return shown, added


def _rows(tensor: Tensor, rows: slice) -> Tensor:
    return tensor if tensor.shape[0] == 1 else tensor[rows]
