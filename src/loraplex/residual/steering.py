"""Attention steering: spans of a row's prompt are emphasised or muted in chosen layers and heads."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loraplex.errors import RequestError

Span = tuple[int, int]  # tokens [start, stop) of the prompt, padding not counted


@dataclass(frozen=True, kw_only=True)
class Steering:
    """Multiply the attention that each token pays to `spans` by `strength`, before it is normalised.

    log(strength) is added to the attention logits of the spans' keys, after any soft-capping and before the softmax.
    Strength 1 changes nothing, 0 masks the keys. Where spans of several steerings overlap, strengths multiply.
    """

    spans: tuple[Span, ...]
    strength: float
    layers: tuple[int, ...] | None = None  # None is every attention layer
    heads: tuple[int, ...] | None = None  # None is every head

    def __post_init__(self) -> None:
        is_number = isinstance(self.strength, int | float) and not isinstance(self.strength, bool)
        if not (is_number and math.isfinite(self.strength) and self.strength >= 0):
            raise RequestError(
                f"steering strength {self.strength!r} can't be used. Give a finite number of at least 0: 1 changes "
                "nothing, 0 masks, 5 multiplies the attention by five before it is normalised."
            )
        if not self.spans:
            raise RequestError("a steering has no spans. Give at least one (start, stop) range of prompt tokens.")

    @property
    def log_strength(self) -> float:
        return math.log(self.strength) if self.strength > 0 else -math.inf

    def reaches(self, layer: int) -> bool:
        """Whether the steering changes anything at the layer."""
        return self.strength != 1 and (self.layers is None or layer in self.layers)


def check_steering(steering: Steering, row: int, prompt_tokens: int, num_heads: dict[int, int]) -> None:
    """Raise RequestError unless spans, layers and heads exist; `num_heads` is by layer."""
    for span in steering.spans:
        start, stop = span
        if not 0 <= start < stop <= prompt_tokens:
            raise RequestError(
                f"row {row}: the span {span} is not in its prompt, which has {prompt_tokens} tokens (padding not "
                f"counted). Give (start, stop) with 0 <= start < stop <= {prompt_tokens}."
            )
    layers = check_layers(steering.layers, row, num_heads, "steering")
    check_heads(steering.heads, row, layers, num_heads, "steering")


def check_layers(layers: Sequence[int] | None, row: int, num_heads: dict[int, int], what: str) -> tuple[int, ...]:
    """The layers meant, all if None. Raises RequestError for one that the base model doesn't have."""
    if layers is None:
        return tuple(num_heads)
    unknown = [layer for layer in layers if layer not in num_heads]
    if unknown or not layers:
        raise RequestError(
            f"row {row}: {what} names the layers {list(layers)}, of which {unknown} don't exist. The base model has "
            f"the attention layers {min(num_heads)} to {max(num_heads)}."
        )
    return tuple(layers)


def check_heads(
    heads: Sequence[int] | None, row: int, layers: Sequence[int], num_heads: dict[int, int], what: str
) -> None:
    """Raise RequestError for a head that one of the layers doesn't have."""
    fewest = min(num_heads[layer] for layer in layers)
    unknown = [head for head in heads or () if not 0 <= head < fewest]
    if unknown or heads == ():
        raise RequestError(
            f"row {row}: {what} names the heads {list(heads or ())}, of which {unknown} don't exist in all of the "
            f"layers {list(layers)}. They have the heads 0 to {fewest - 1}."
        )


def log_strengths(
    steered: Sequence[tuple[int, Sequence[Steering], int]],  # place among the rows, steerings, padding on the left
    num_rows: int,
    num_heads: int,
    first_key: int,
    num_keys: int,
    device: torch.device,
) -> Tensor:  # [rows, heads, keys]  float32
    """What to add to the logits of a layer's keys [first_key, first_key + num_keys)."""
    added = torch.zeros(num_rows, num_heads, num_keys, device=device)
    for place, steerings, padding in steered:
        for steering in steerings:
            heads = slice(None) if steering.heads is None else list(steering.heads)
            times = _times_spanned(steering, padding - first_key, num_keys).to(device)
            added[place, heads] += torch.where(times > 0, times * steering.log_strength, 0)  # 0 * -inf is no number
    return added


def _times_spanned(steering: Steering, shift: int, num_keys: int) -> Tensor:  # [keys]  float32
    """How many of the spans each key is in: the running sum of +1 where one starts, and -1 where it stops."""
    edges = torch.tensor(steering.spans, dtype=torch.int64).add_(shift).clamp_(0, num_keys)  # [spans, 2]
    changes = torch.zeros(num_keys + 1)
    changes.index_add_(0, edges[:, 0], torch.ones(len(edges)))
    changes.index_add_(0, edges[:, 1], -torch.ones(len(edges)))
    return changes[:num_keys].cumsum(0)
