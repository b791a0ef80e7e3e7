"""The kinds of residual that a link may name: trained, constant, or a user's function; and the base they belong to."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from loraplex.errors import BaseModelMismatchError, ConfigError
from loraplex.residual.fingerprint import BaseFingerprint, check_same_base
from loraplex.residual.gates import GateResidual
from loraplex.residual.positions import ALL, Positions
from loraplex.residual.reft import ReftResidual, Site
from loraplex.validation import is_finite, is_whole, listed, quoted

MAX_RANK = 1 << 20
SMALL_RANK = 1024


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


@dataclass(frozen=True, kw_only=True, eq=False)
class LinkedLayer:
    """A LinkedResidual's weights at one attention layer.

    `b` is stored as [rank, hidden], as LoRA's second factor is elsewhere (adapters/weights.py).
    """

    a: Tensor  # [rank, hidden]
    b: Tensor  # [rank, hidden]
    head_logits: Tensor  # [rank, heads]; softmax over heads weighs them

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def to(self, device: torch.device | str) -> "LinkedLayer":
        """The same weights on a device; on the one where they are, the same object."""
        if self.a.device == torch.device(device):
            return self
        return LinkedLayer(a=self.a.to(device), b=self.b.to(device), head_logits=self.head_logits.to(device))

    @property
    def num_parameters(self) -> int:
        return sum(tensor.numel() for tensor in (self.a, self.b, self.head_logits))


@dataclass(frozen=True, kw_only=True, eq=False)
class LinkedResidual:
    """A Linked Local Response Aggregator: attention, captured, aggregates local responses into a residual.

    For query t and keys s of a layer with the block's normed input x and attention weights a_h (one for each head):

        u[s]    = A x[s]                                            local response, in rank space
        w_k     = sum_h softmax(head_logits[k])[h] a_h              each row of w_k sums to 1
        v[t, k] = sum_s w_k[t, s] u[s, k]
        residual[t] = weight * (alpha/r) * B v[t]                   added to the attention block's output
    """

    no_lora_because: ClassVar[str] = (
        "what it adds depends on what a token attends to, so no weights of the base model are equal to it"
    )
    config: ResidualConfig
    layers: Mapping[int, LinkedLayer]
    base: BaseFingerprint
    end_tokens: tuple[int, ...] = ()  # that end its answers, besides the base model's; none: not known

    @property
    def num_parameters(self) -> int:
        return sum(layer.num_parameters for layer in self.layers.values())

    def tensors(self) -> Iterator[Tensor]:
        for layer in self.layers.values():
            yield from (layer.a, layer.b, layer.head_logits)

    def to(self, device: torch.device) -> "LinkedResidual":
        """The same residual on a device."""
        return replace(self, layers={number: layer.to(device) for number, layer in self.layers.items()})


@dataclass(frozen=True, kw_only=True, eq=False)
class SteeringVector:
    """A constant residual: weight * vectors[layer] is added to what the layer's site puts out, at the tokens meant.

    The sites are the attention block, the feed-forward block, and the whole decoder block, whose output is the
    residual stream: there control vectors act.
    """

    no_lora_because: ClassVar[str] = "it adds a constant to hidden states, which is no low-rank factor of a weight"
    vectors: Mapping[int, Tensor]  # by layer, [hidden]
    base: BaseFingerprint | None  # None: not known, only the sizes are checked
    site: Site = "attention"
    positions: Positions = ALL

    @property
    def layers(self) -> Mapping[int, Tensor]:
        return self.vectors

    @property
    def num_parameters(self) -> int:
        return sum(vector.numel() for vector in self.vectors.values())

    def tensors(self) -> Iterator[Tensor]:
        yield from self.vectors.values()

    def to(self, device: torch.device) -> "SteeringVector":
        """The same vectors on a device."""
        return replace(self, vectors={layer: vector.to(device) for layer, vector in self.vectors.items()})


@dataclass(frozen=True, kw_only=True)
class ResidualContext:
    """What a function is told besides the tensors."""

    name: str
    layer: int
    row: int  # of the batch; a beam's row is the one that it came from
    weight: float  # of the link; what the function returns is multiplied by it
    first_position: int  # of the first of these tokens among the keys
    num_padding: int  # keys on the left that are padding


# (hidden [tokens, hidden], attention [heads, tokens, keys], context) -> residual [tokens, hidden]
ResidualFunction = Callable[[Tensor, Tensor, ResidualContext], Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class FunctionResidual:
    """A user's function in the place of a trained residual; called for every row, layer and pass on its own.

    With a KV cache a pass has the new tokens only, and attention from them to all keys: a function whose result for
    a token depends on that token's hidden state and attention alone is exact with a cache and without.
    """

    no_lora_because: ClassVar[str] = "it is Python code"
    function: ResidualFunction
    layers: tuple[int, ...] | None = None  # None is every attention layer

    def to(self, device: torch.device) -> "FunctionResidual":
        """The function itself: its tensors are its own."""
        return self


AttentionResidual = LinkedResidual | SteeringVector | FunctionResidual
Residual = AttentionResidual | ReftResidual | GateResidual


def fresh_linked_layer(hidden_size: int, num_heads: int, rank: int, draw: torch.Generator) -> LinkedLayer:
    """First weights: A as LoRA's (Kaiming uniform, a = sqrt 5), B zero, all heads alike."""
    bound = hidden_size**-0.5
    a = torch.empty(rank, hidden_size).uniform_(-bound, bound, generator=draw)
    return LinkedLayer(a=a, b=torch.zeros(rank, hidden_size), head_logits=torch.zeros(rank, num_heads))


# What fits together


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


def check_residual_fits(
    name: str, residual: AttentionResidual, identity: BaseFingerprint, num_heads: Mapping[int, int]
) -> None:
    """Raise BaseModelMismatchError unless the residual was made for such a base and its layers are there."""
    missing = [layer for layer in residual.layers or () if layer not in num_heads]
    if missing:
        raise BaseModelMismatchError(
            f"residual {name!r} has the layers {missing}, which this base model doesn't have: its attention layers are "
            f"{min(num_heads)} to {max(num_heads)}."
        )
    if isinstance(residual, FunctionResidual):
        return
    if residual.base is not None:
        check_same_base(name, residual.base, identity)
    wrong = []
    for layer, weights in residual.layers.items():
        if isinstance(residual, LinkedResidual):
            linked = residual.layers[layer]
            shapes = (tuple(linked.a.shape), tuple(linked.b.shape), tuple(linked.head_logits.shape))
            hidden = (linked.rank, identity.hidden_size)
            if shapes != (hidden, hidden, (linked.rank, num_heads[layer])):
                wrong.append(f"layer {layer}")
        elif tuple(weights.shape) != (identity.hidden_size,):  # type: ignore[union-attr]
            wrong.append(f"layer {layer}")
    if wrong:
        raise BaseModelMismatchError(
            f"residual {name!r} has weights of other shapes than this base model needs, at {listed(wrong)}. Load the "
            "base model that it was made for."
        )
