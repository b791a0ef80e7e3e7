"""Low-rank interventions on hidden states, as ReFT learns them (arXiv 2404.03592)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Literal

import torch
from torch import Tensor

from loraplex.errors import ConfigError
from loraplex.residual.fingerprint import BaseFingerprint
from loraplex.residual.positions import ALL, Positions
from loraplex.validation import is_whole, quoted

Site = Literal["attention", "mlp", "block"]
SITES: tuple[Site, ...] = ("attention", "mlp", "block")


EDGES = Positions("edges", 7, 7)  # where pyreft's examples act


@dataclass(frozen=True, kw_only=True)
class ReftConfig:
    """What LoReFT trains: interventions of one rank behind some blocks, at chosen tokens."""

    r: int = 4
    layers: tuple[int, ...] | None = None  # numbers of blocks; None is all of them
    positions: Positions = EDGES

    def __post_init__(self) -> None:
        if not (is_whole(self.r) and self.r >= 1):
            raise ConfigError(f"r is {quoted(self.r)}; a rank must be a whole number of at least 1.")
        layers = self.layers
        if layers is not None and not (layers and len(set(layers)) == len(layers) and all(map(is_whole, layers))):
            raise ConfigError(f"layers is {quoted(layers)}; give different numbers of blocks, such as (10, 11).")
        if not isinstance(self.positions, Positions):
            raise ConfigError(
                f"positions are {quoted(self.positions)}; give Positions, such as parse_positions('f7+l7')."
            )
        if self.positions.which == "generated":
            raise ConfigError("positions are 'generated', which training has none of. Use 'all', 'prompt' or 'f7+l7'.")


@dataclass(frozen=True, kw_only=True, eq=False)
class Intervention:
    """One low-rank change of the hidden states h at one site of one block:

        h + weight * R^T (W h + b - R h)    LoReFT
        h + weight * R^T (W h + b)          DiReFT, where `subtracts` is False

    ConsReFT is LoReFT with W = 0, LobiReFT is DiReFT with W = 0; R needn't be orthogonal (NoReFT, NodiReFT).
    """

    block: int
    site: Site = "block"
    positions: Positions = ALL
    r: Tensor  # [rank, hidden]
    w: Tensor  # [rank, hidden]
    b: Tensor  # [rank]
    subtracts: bool = True

    @property
    def rank(self) -> int:
        return self.r.shape[0]

    @cached_property
    def read(self) -> Tensor:  # [rank, hidden]  float32
        """W - R, or W: what the hidden state is multiplied by."""
        w = self.w.double()
        return (w - self.r.double() if self.subtracts else w).float()

    def tensors(self) -> Iterator[Tensor]:
        yield from (self.r, self.w, self.b)

    def to(self, device: torch.device) -> "Intervention":
        """The same on a device."""
        return replace(self, r=self.r.to(device), w=self.w.to(device), b=self.b.to(device))


@dataclass(frozen=True, kw_only=True, eq=False)
class ReftResidual:
    """Interventions under one name, in the order in which they act where they share a site."""

    no_lora_because: ClassVar[str] = "it changes hidden states at chosen tokens, which is no change of a weight"
    interventions: Sequence[Intervention]
    base: BaseFingerprint | None = None  # None: not known, only the sizes are checked
    end_tokens: tuple[int, ...] = ()  # that end its answers, besides the base model's; none: not known

    @property
    def layers(self) -> frozenset[int]:
        return frozenset(one.block for one in self.interventions)

    @property
    def num_parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.tensors())

    def tensors(self) -> Iterator[Tensor]:
        for one in self.interventions:
            yield from one.tensors()

    def to(self, device: torch.device) -> "ReftResidual":
        """The same interventions on a device."""
        return replace(self, interventions=tuple(one.to(device) for one in self.interventions))
