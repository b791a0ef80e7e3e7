"""From text to spans: marked prompts, and the tokens that stand for a part of a text."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from loraplex.errors import RequestError
from loraplex.residual.steering import Span

OPEN, CLOSE = "<<", ">>"
Range = tuple[int, int]  # characters [start, stop)
MAX_RANGES = 256  # places of one text: each costs time in every layer of every step
_LONGEST_QUOTE = 200  # characters of a prompt that an error shows


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
