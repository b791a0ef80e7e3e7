"""Attention steering: spans of a row's prompt are emphasised or muted in chosen layers and heads."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from loraplex.errors import RequestError
from loraplex.validation import is_finite

Span = tuple[int, int]  # tokens [start, stop) of the prompt, padding not counted
Range = tuple[int, int]  # characters [start, stop)
MAX_RANGES = 256  # places of one text: each costs time in every layer of every step
LEAST_PAID = 1e-30  # of a head's attention: keys that get less can't be raised to a share in float32
_LONGEST_QUOTE = 200  # characters of a prompt that an error shows
OPEN, CLOSE = "<<", ">>"


@dataclass(frozen=True, kw_only=True)
class Steering:
    """Multiply the attention that each token pays to `spans` by `strength`, or see that they get a `share` of it.

    log(strength) is added to the attention logits of the spans' keys, after any soft-capping and before the softmax.
    Strength 1 changes nothing, 0 masks the keys. Where spans of several steerings overlap, strengths multiply.

    With a share in its place, heads that pay the spans less of their attention than that pay exactly so much, and the
    rest to the other keys in their proportions; heads that pay them more stay as they are, and so do tokens that see
    none of them, or pay them less than LEAST_PAID. That is SpotLight (arXiv 2505.12025), whose bias
    log(share / attention) falls short of the share by what normalising takes. Shares come after strengths, in their
    order.
    """

    spans: tuple[Span, ...]
    strength: float = 1.0
    layers: tuple[int, ...] | None = None  # None is every attention layer
    heads: tuple[int, ...] | None = None  # None is every head
    share: float | None = None

    def __post_init__(self) -> None:
        is_number = isinstance(self.strength, int | float) and not isinstance(self.strength, bool)
        if not (is_number and math.isfinite(self.strength) and self.strength >= 0):
            raise RequestError(
                f"steering strength {self.strength!r} can't be used. Give a finite number of at least 0: 1 changes "
                "nothing, 0 masks, 5 multiplies the attention by five before it is normalised."
            )
        if self.share is not None and not (is_finite(self.share) and 0 < self.share < 1):
            raise RequestError(
                f"steering share {self.share!r} can't be used. Give a number between 0 and 1: 0.3 gives the spans "
                "three tenths of each head's attention, where they get less."
            )
        if self.share is not None and self.strength != 1:
            raise RequestError(
                f"a steering has the strength {self.strength!r} and the share {self.share!r}. Give one of them, or two "
                "steerings."
            )
        if not self.spans:
            raise RequestError("a steering has no spans. Give at least one (start, stop) range of prompt tokens.")

    @property
    def log_strength(self) -> float:
        return math.log(self.strength) if self.strength > 0 else -math.inf

    def reaches(self, layer: int) -> bool:
        """Whether the steering changes anything at the layer."""
        return self.changes and (self.layers is None or layer in self.layers)

    @property
    def changes(self) -> bool:
        """Whether it changes anything."""
        return self.strength != 1 or self.share is not None

    def meant(self, shift: int, num_keys: int) -> Tensor:  # [keys]  bool
        """Which of a layer's keys are in a span; the prompt begins at the key `shift`."""
        return _times_spanned(self, shift, num_keys) > 0


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


class KeyShare(NamedTuple):
    """Some keys of one row, and the share that they get."""

    place: int  # among the rows
    keys: Tensor  # [keys]  bool
    heads: tuple[int, ...] | None
    share: float

    def factors(self, weights: Tensor) -> Tensor:  # [heads, queries, keys]
        """What weights [heads, queries, keys] of the row are multiplied by."""
        paid = (weights * self.keys).sum(dim=-1, keepdim=True)
        is_less = (paid >= LEAST_PAID) & (paid < self.share)
        if self.heads is not None:
            own = torch.zeros(len(weights), 1, 1, dtype=torch.bool, device=weights.device)
            own[list(self.heads)] = True
            is_less &= own
        paid = torch.where(is_less, paid, self.share)
        return torch.where(self.keys, self.share / paid, (1 - self.share) / (1 - paid))


def key_shares(
    steered: Sequence[tuple[int, Sequence[Steering], int]], first_key: int, num_keys: int, device: torch.device
) -> list[KeyShare]:
    """The shares of a layer's keys [first_key, first_key + num_keys), in their order."""
    return [
        KeyShare(place, steering.meant(padding - first_key, num_keys).to(device), steering.heads, steering.share)
        for place, steerings, padding in steered
        for steering in steerings
        if steering.share is not None
    ]


def _times_spanned(steering: Steering, shift: int, num_keys: int) -> Tensor:  # [keys]  float32
    """How many of the spans each key is in: the running sum of +1 where one starts, and -1 where it stops."""
    edges = torch.tensor(steering.spans, dtype=torch.int64).add_(shift).clamp_(0, num_keys)  # [spans, 2]
    changes = torch.zeros(num_keys + 1)
    changes.index_add_(0, edges[:, 0], torch.ones(len(edges)))
    changes.index_add_(0, edges[:, 1], -torch.ones(len(edges)))
    return changes[:num_keys].cumsum(0)


# Spans by their text


class MarkedText(NamedTuple):
    """A text whose marks were taken out, and the ranges of characters that stood between them."""

    text: str
    ranges: tuple[tuple[int, int], ...]


def unmark(marked: str, opening: str = OPEN, closing: str = CLOSE) -> MarkedText:
    """Read "Use only <<this passage>>, please": the text without marks, and what was marked.

    Raises RequestError for marks that don't pair, are nested, or hold nothing.
    """
    text, ranges, rest, start = "", [], marked, None
    while True:
        wanted, other = (opening, closing) if start is None else (closing, opening)
        place, wrong = rest.find(wanted), rest.find(other)
        if wrong >= 0 and (place < 0 or wrong < place):
            raise RequestError(
                f"the marks in {marked!r} don't pair: {other!r} stands where {wanted!r} is due. Mark a span as "
                f"{opening}...{closing}; marks can't be nested."
            )
        if place < 0:
            break
        text, rest = text + rest[:place], rest[place + len(wanted) :]
        if start is not None:
            if len(text) == start:
                raise RequestError(f"a mark in {marked!r} holds nothing. Put the marks around some text.")
            ranges.append((start, len(text)))
        start = len(text) if start is None else None
    if start is not None:
        raise RequestError(f"the last mark in {marked!r} is not closed. Write {closing!r} where the span ends.")
    return MarkedText(text + rest, tuple(ranges))


def spans_of_text(
    tokenizer: PreTrainedTokenizerBase, prompt: str, part: str, *, add_special_tokens: bool = False
) -> tuple[Span, ...]:
    """Every place of `part` in `prompt`, in tokens. Raises RequestError if it is not there, or too often."""
    return spans_of_ranges(tokenizer, prompt, ranges_of_text(prompt, part), add_special_tokens=add_special_tokens)


def ranges_of_text(prompt: str, part: str, most: int = MAX_RANGES) -> list[Range]:
    """Every place of `part` in `prompt`, in characters. Raises RequestError if it is not there, or too often."""
    ranges: list[Range] = []
    start = prompt.find(part) if part else -1
    while start >= 0:
        if len(ranges) == most:
            raise RequestError(
                f"{_shortened(part)} is in the prompt more than {most} times, the most that can be looked up. Give a "
                "longer part, or spans as token ranges."
            )
        ranges.append((start, start + len(part)))
        start = prompt.find(part, start + len(part))
    if not ranges:
        raise RequestError(
            f"{_shortened(part)} is not in the prompt {_shortened(prompt)}. Give a part of the prompt as it is written."
        )
    return ranges


def spans_of_ranges(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    ranges: Sequence[Range],
    *,
    add_special_tokens: bool = False,
) -> tuple[Span, ...]:
    """The tokens that have at least one character of each range. Raises RequestError."""
    if not tokenizer.is_fast:
        raise RequestError(
            f"{type(tokenizer).__name__} doesn't tell which characters a token stands for. Give spans as token ranges."
        )
    encoded = tokenizer(prompt, return_offsets_mapping=True, add_special_tokens=add_special_tokens)
    return TokenOffsets(encoded["offset_mapping"]).spans(ranges, prompt)


class TokenOffsets:
    """Which characters the tokens of a text stand for, made to be looked up: O(tokens) once, then O(log tokens)."""

    def __init__(self, offsets: Sequence[Range]) -> None:
        pairs = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
        self._tokens = np.flatnonzero(pairs[:, 1] > pairs[:, 0])  # those that stand for characters
        kept = pairs[self._tokens]
        # As they stand in the text, starts and stops ascend; made sure of, as searching depends on it.
        self._stops = np.maximum.accumulate(kept[:, 1])
        self._starts = np.minimum.accumulate(kept[::-1, 0])[::-1]

    def spans(self, ranges: Sequence[Range], prompt: str) -> tuple[Span, ...]:
        """The tokens that have at least one character of each range. Raises RequestError if there is none."""
        wanted = np.asarray(ranges, dtype=np.int64).reshape(-1, 2)
        first = np.searchsorted(self._stops, wanted[:, 0], side="right")
        last = np.searchsorted(self._starts, wanted[:, 1], side="left")
        for (start, stop), is_empty in zip(ranges, first >= last, strict=True):
            if is_empty:
                raise RequestError(
                    f"no token stands for the characters {start} to {stop} of {_shortened(prompt)}. Give a range with "
                    "some text."
                )
        return tuple(zip(self._tokens[first].tolist(), (self._tokens[last - 1] + 1).tolist(), strict=True))


def _shortened(text: str) -> str:
    return repr(text) if len(text) <= _LONGEST_QUOTE else f"{text[:_LONGEST_QUOTE]!r}... ({len(text)} characters)"
