"""The changes that adapters make to modules' own weights: a linear module's, an embedding's, any other module's.

Where W' takes the place of W, the output gains gate * (W' - W) x: all of it at a gate of 1, and nothing for the base.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from loraplex.adapters.store.module_change import Product


def gated(change: Tensor, gate: float | Tensor) -> Tensor:  # [n, out] or [out], [n]
    """gate[t] * change[t]."""
    if isinstance(gate, Tensor):
        return change * gate.unsqueeze(-1)
    return change if gate == 1.0 else change * gate


def _num_bytes(*tensors: Tensor | None) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def _moved(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device)


@dataclass(frozen=True, kw_only=True)
class LinearChange:
    """y += D x + d, D = W' - W for the outputs where they differ and d = b' - b; and outputs that W doesn't have."""

    weight: Tensor | None = None  # [changed outputs, in]  D
    outputs: Tensor | None = None  # [changed outputs] int64; None: all of the base's
    bias: Tensor | None = None  # [out]  d
    added: Tensor | None = None  # [added outputs, in]  behind the base's
    size: int | None = None  # outputs in all; None: as many as the base's

    @property
    def num_bytes(self) -> int:
        return _num_bytes(self.weight, self.outputs, self.bias, self.added)

    def to(self, device: torch.device) -> "LinearChange":
        return LinearChange(
            weight=_moved(self.weight, device),
            outputs=_moved(self.outputs, device),
            bias=_moved(self.bias, device),
            added=_moved(self.added, device),
            size=self.size,
        )

    def add(self, y: Tensor, x: Tensor, gate: float | Tensor, product: Product) -> None:
        if self.weight is not None:
            change = gated(product(x, self.weight), gate)
            if self.outputs is None:
                y[:, : change.shape[1]].add_(change)
            else:
                y[:, self.outputs] = (y[:, self.outputs] + change).to(y.dtype)
        if self.bias is not None:
            y[:, : len(self.bias)].add_(gated(self.bias, gate))
        if self.added is not None:
            assert self.size is not None, "added outputs come with their number"
            change = gated(product(x, self.added), gate)
            own = y[:, self.size - len(self.added) : self.size]
            own.copy_(torch.where(own.isneginf(), change, own + change))  # what the base lacks is -inf so far


@dataclass(frozen=True, kw_only=True)
class EmbeddingChange:
    """y[t] += D[ids[t]], D = scale * (E' - E) for the tokens whose rows differ; E is 0 for tokens that it lacks."""

    index: Tensor  # [tokens] int32  the place of each token in `rows`
    rows: Tensor  # [changed + 1, hidden]  the last is zero: of the tokens that stay
    size: int | None = None  # None: as many tokens as the base's

    @property
    def num_bytes(self) -> int:
        return _num_bytes(self.index, self.rows)

    def to(self, device: torch.device) -> "EmbeddingChange":
        return EmbeddingChange(index=self.index.to(device), rows=self.rows.to(device), size=self.size)

    def add(self, y: Tensor, x: Tensor, gate: float | Tensor, product: Product) -> None:
        num_tokens = len(self.index)
        places = self.index[x.clamp(max=num_tokens - 1)].long()
        places = places.where(x < num_tokens, len(self.rows) - 1)  # tokens of an adapter that it is linked with
        y.add_(gated(self.rows[places], gate))


@dataclass(frozen=True)
class OtherChange:
    """y += f'(x) - f(x), of a module f that treats each token by itself (a norm), run with other parameters."""

    module: nn.Module
    parameters: Mapping[str, Tensor]
    size: None = None

    @property
    def num_bytes(self) -> int:
        return _num_bytes(*self.parameters.values())

    def to(self, device: torch.device) -> "OtherChange":
        return OtherChange(self.module, {name: tensor.to(device) for name, tensor in self.parameters.items()})

    def add(self, y: Tensor, x: Tensor, gate: float | Tensor, product: Product) -> None:
        y.add_(gated(self._changed(x) - self._unchanged(x), gate))

    @cached_property
    def _changed(self) -> nn.Module:
        return beside(self.module, self.parameters)

    @cached_property
    def _unchanged(self) -> nn.Module:
        return beside(self.module, {})


def beside(module: nn.Module, parameters: Mapping[str, Tensor]) -> nn.Module:
    """The same code and settings with some other parameters, and without hooks; the module stays as it is."""
    made = copy.copy(module)
    own = {name: nn.Parameter(tensor, requires_grad=False) for name, tensor in parameters.items()}
    vars(made)["_parameters"] = {**module._parameters, **own}
    for hooks in ("_forward_hooks", "_forward_pre_hooks"):
        vars(made)[hooks] = type(vars(module)[hooks])()
    return made
