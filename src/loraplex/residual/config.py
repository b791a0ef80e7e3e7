"""What a linked residual adapter is made of, and the base model that it belongs to."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from loraplex.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class BaseIdentity:
    """What a residual adapter must find in a base model: the same class with the same sizes."""

    architecture: str  # "LlamaForCausalLM"
    hidden_size: int
    vocab_size: int
    num_heads: tuple[int, ...]  # of each attention layer
    name: str | None = None  # informative: the same model may lie in any folder

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"num_heads": list(self.num_heads)}


@dataclass(frozen=True, kw_only=True)
class ResidualConfig:
    """The settings of a LinkedResidual: its rank, its strength, and the attention layers that it is attached to."""

    r: int = 8
    alpha: float = 8.0
    layers: tuple[int, ...] | None = None  # numbers of attention layers; None is all of them

    def __post_init__(self) -> None:
        if not isinstance(self.r, int) or isinstance(self.r, bool) or self.r < 1:
            raise ConfigError(f"r is {self.r!r}; a rank must be a whole number of at least 1.")
        is_number = isinstance(self.alpha, int | float) and not isinstance(self.alpha, bool)
        if not (is_number and math.isfinite(self.alpha)):
            raise ConfigError(f"alpha is {self.alpha!r}; it must be a finite number.")
        if self.layers is not None:
            check_layer_numbers("layers", self.layers)

    @property
    def scaling(self) -> float:
        return self.alpha / self.r


def check_layer_numbers(option: str, layers: object) -> None:
    """Raise ConfigError unless `layers` is a tuple of different whole numbers of at least 0."""
    is_tuple = isinstance(layers, tuple) and len(layers) > 0
    if is_tuple and all(isinstance(layer, int) and not isinstance(layer, bool) and layer >= 0 for layer in layers):  # type: ignore[attr-defined]
        if len(set(layers)) == len(layers):  # type: ignore[arg-type,call-overload]
            return
        raise ConfigError(f"{option} is {layers!r}, which names a layer twice. Name each layer once.")
    raise ConfigError(f"{option} is {layers!r}; it must be a tuple of layer numbers such as (10, 11), counted from 0.")
