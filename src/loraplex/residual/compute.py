"""The residuals of one place in the links of several rows, at one layer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from loraplex.errors import AdapterError
from loraplex.residual.attention_weights import AttentionWeights
from loraplex.residual.modules import FunctionResidual, LinkedLayer, ResidualContext

# u of the new tokens [rows, tokens, rank] -> u of all keys [rows, keys, rank]
Extend = Callable[[Tensor], Tensor]


class ResidualTerm(Protocol):
    """Some rows' residuals; `index` are their places among the rows of the layer, None for all."""

    @property
    def index(self) -> Tensor | None: ...

    def run(self, x: Tensor, weights: AttentionWeights, extend: Extend) -> Tensor:
        """The residual [rows, tokens, hidden] of x [rows, tokens, hidden], in x's dtype."""
        ...


@dataclass(frozen=True, kw_only=True)
class LinkedTerm:
    """Trained residuals of several rows, stacked; ranks are padded with zeros to the largest."""

    index: Tensor | None
    a: Tensor  # [rows or 1, rank, hidden]
    b: Tensor  # [rows or 1, rank, hidden]
    mix: Tensor  # [rows or 1, heads, 1, rank]  softmax over heads
    scale: Tensor  # [rows, 1, 1]  weight * alpha/r

    def run(self, x: Tensor, weights: AttentionWeights, extend: Extend) -> Tensor:
        u = extend(x @ self.a.transpose(1, 2))  # [rows, keys, rank]
        heard = weights.apply(u.unsqueeze(1), self.index)  # [rows, heads, tokens, rank]
        v = (heard * self.mix).sum(dim=1)  # [rows, tokens, rank]
        return (v * self.scale) @ self.b


@dataclass(frozen=True, kw_only=True)
class VectorTerm:
    """Constant residuals of several rows."""

    index: Tensor | None
    vectors: Tensor  # [rows, 1, hidden]  weight folded in

    def run(self, x: Tensor, weights: AttentionWeights, extend: Extend) -> Tensor:
        return self.vectors.expand_as(x)


@dataclass(frozen=True, kw_only=True)
class FunctionTerm:
    """A user's function for one sequence."""

    index: Tensor  # [1]
    residual: FunctionResidual
    name: str
    layer: int
    row: int
    weight: float
    num_padding: int
    failures: dict[int, AdapterError] | None  # by row: recorded there, and the row goes on without; None raises

    def run(self, x: Tensor, weights: AttentionWeights, extend: Extend) -> Tensor:
        if self.failures is not None and self.row in self.failures:
            return torch.zeros_like(x)
        try:
            return self._call(x[0], weights).unsqueeze(0).to(x.dtype)
        except AdapterError as error:
            if self.failures is None:
                raise
            self.failures[self.row] = error
            return torch.zeros_like(x)

    def _call(self, x: Tensor, weights: AttentionWeights) -> Tensor:  # [tokens, hidden]
        attention = weights.queries(0, weights.num_queries, int(self.index[0]))
        where = f"the function residual {self.name!r} at layer {self.layer} of row {self.row}"
        context = ResidualContext(
            name=self.name,
            layer=self.layer,
            row=self.row,
            weight=self.weight,
            first_position=weights.num_keys - weights.num_queries,
            num_padding=max(0, self.num_padding - weights.first_key),
        )
        try:
            result = self.residual.function(x, attention, context)
        except Exception as error:  # a user's function may fail in any way
            raise AdapterError(f"{where} raised {type(error).__name__}: {error}.") from error
        if not isinstance(result, Tensor) or result.shape != x.shape:
            found = list(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise AdapterError(
                f"{where} returned {found}; it must return a tensor of shape {list(x.shape)} [tokens, hidden]."
            )
        if not bool(torch.isfinite(result).all()):
            raise AdapterError(f"{where} returned NaN or infinite numbers. Check the function for these inputs.")
        return result * self.weight


def stack_linked(
    layers: Sequence[LinkedLayer], scales: Sequence[float], index: Tensor | None, dtype: torch.dtype
) -> LinkedTerm:
    """One LinkedTerm for rows with these weights; a weight that all rows share is kept once."""
    different: dict[int, LinkedLayer] = {id(layer): layer for layer in layers}
    rank = max(layer.rank for layer in different.values())
    numbers = {identity: number for number, identity in enumerate(different)}
    device = layers[0].a.device
    a = torch.stack([_padded(layer.a, rank) for layer in different.values()]).to(dtype)
    b = torch.stack([_padded(layer.b, rank) for layer in different.values()]).to(dtype)
    logits = torch.stack([_padded(layer.head_logits, rank) for layer in different.values()]).to(dtype)
    mix = torch.softmax(logits, dim=-1).transpose(1, 2).unsqueeze(2)
    if len(different) > 1:
        chosen = torch.tensor([numbers[id(layer)] for layer in layers], device=device)
        a, b, mix = a[chosen], b[chosen], mix[chosen]
    scale = torch.tensor(scales, dtype=dtype, device=device).view(-1, 1, 1)
    return LinkedTerm(index=index, a=a, b=b, mix=mix, scale=scale)


def _padded(factor: Tensor, rank: int) -> Tensor:
    missing = rank - factor.shape[0]
    return factor if missing == 0 else torch.nn.functional.pad(factor, (0, 0, 0, missing))
