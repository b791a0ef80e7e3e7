"""What a row asks of attention: residuals, a capture, steerings."""

from collections.abc import Sequence
from dataclasses import dataclass

from loraplex.errors import BatchError
from loraplex.residual.capture import CaptureRequest
from loraplex.residual.modules import LinkedResidual, Residual
from loraplex.residual.steering import Steering


@dataclass(frozen=True, kw_only=True)
class ChainLink:
    """One residual of a row's link."""

    name: str
    residual: Residual
    weight: float = 1.0

    def reaches(self, layer: int) -> bool:
        """Whether the residual adds anything at the layer."""
        layers = self.residual.layers
        return self.weight != 0 and (layers is None or layer in layers)


@dataclass(frozen=True, kw_only=True, eq=False)
class RowAttention:
    """One row of a batch; by default it asks for nothing."""

    chain: tuple[ChainLink, ...] = ()  # in the order of the link
    capture: CaptureRequest | None = None
    steering: tuple[Steering, ...] = ()

    @property
    def asks(self) -> bool:
        return bool(self.chain or self.capture or any(steering.changes for steering in self.steering))

    def chain_at(self, layer: int) -> list[ChainLink]:
        """The residuals that reach a layer, in the order of the link."""
        return [link for link in self.chain if link.reaches(layer)]

    def steering_at(self, layer: int) -> list[Steering]:
        """The steerings that reach a layer."""
        return [steering for steering in self.steering if steering.reaches(layer)]

    def rank(self, layer: int, place: int) -> int:
        """The rank of the residual at a layer and place in the link; 0 where there is none or it has no rank."""
        here = self.chain_at(layer)
        residual = here[place].residual if place < len(here) else None
        return residual.layers[layer].rank if isinstance(residual, LinkedResidual) else 0

    @property
    def has_linked(self) -> bool:
        """Whether it has residuals that need numbers of earlier tokens."""
        return any(isinstance(link.residual, LinkedResidual) for link in self.chain)


def rows_of(
    chains: Sequence[tuple[ChainLink, ...]],
    capture: Sequence[CaptureRequest | None] | CaptureRequest | None = None,
    steering: Sequence[Sequence[Steering] | Steering | None] | None = None,
) -> list[RowAttention]:
    """One RowAttention for each row. A single CaptureRequest stands for all rows. Raises BatchError."""
    num_rows = len(chains)
    captures = [capture] * num_rows if isinstance(capture, CaptureRequest) or capture is None else list(capture)
    steerings = [None] * num_rows if steering is None else list(steering)
    for name, given in (("capture", captures), ("steering", steerings)):
        if len(given) != num_rows:
            raise BatchError(
                f"{name} has {len(given)} entries but the batch has {num_rows} rows. Pass one for each row."
            )
    return [
        RowAttention(chain=chain, capture=wanted, steering=_as_tuple(steered))
        for chain, wanted, steered in zip(chains, captures, steerings, strict=True)
    ]


def _as_tuple(steering: Sequence[Steering] | Steering | None) -> tuple[Steering, ...]:
    if steering is None:
        return ()
    return (steering,) if isinstance(steering, Steering) else tuple(steering)
