"""What a linked residual adapter is made of, and the base model that it belongs to."""

from dataclasses import asdict, dataclass
from typing import Any

from loraplex.errors import ConfigError
from loraplex.validation import is_finite, is_whole, quoted

MAX_RANK = 1 << 20
SMALL_RANK = 1024


@dataclass(frozen=True, kw_only=True)
class BaseFingerprint:
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
        if not (is_whole(self.r) and 1 <= self.r <= MAX_RANK):
            raise ConfigError(
                f"r is {quoted(self.r)}; a rank must be a whole number of at least 1, and {MAX_RANK} at most."
            )
        if not is_finite(self.alpha):
            raise ConfigError(f"alpha is {quoted(self.alpha)}; it must be a finite number of float32's range.")
        if self.layers is not None:
            check_layer_numbers("layers", self.layers)

    @property
    def scaling(self) -> float:
        return self.alpha / self.r


def check_rank(rank: int, hidden_size: int) -> None:
    """Raise ConfigError for a rank that is larger than the hidden size, where it isn't small anyway."""
    most = max(hidden_size, SMALL_RANK)
    if rank > most:
        raise ConfigError(f"r is {rank}; on hidden states of size {hidden_size} it may be {most} at most.")


def check_layer_numbers(option: str, layers: object) -> None:
    """Raise ConfigError unless `layers` is a tuple of different whole numbers of at least 0."""
    is_tuple = isinstance(layers, tuple) and len(layers) > 0
    if is_tuple and all(isinstance(layer, int) and not isinstance(layer, bool) and layer >= 0 for layer in layers):  # type: ignore[attr-defined]
        if len(set(layers)) == len(layers):  # type: ignore[arg-type,call-overload]
            return
        raise ConfigError(f"{option} is {quoted(layers)}, which names a layer twice. Name each layer once.")
    raise ConfigError(
        f"{option} is {quoted(layers)}; it must be a tuple of layer numbers such as (10, 11), counted from 0."
    )
