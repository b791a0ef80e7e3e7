"""From text to spans: marked prompts, and the tokens that stand for a part of a text."""

from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from loraplex.errors import RequestError
from loraplex.residual.steering import Span

OPEN, CLOSE = "<<", ">>"


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
    """Every place of `part` in `prompt`, in tokens. Raises RequestError if it is not there."""
    ranges, start = [], prompt.find(part) if part else -1
    while start >= 0:
        ranges.append((start, start + len(part)))
        start = prompt.find(part, start + len(part))
    if not ranges:
        raise RequestError(f"{part!r} is not in the prompt {prompt!r}. Give a part of the prompt as it is written.")
    return spans_of_ranges(tokenizer, prompt, ranges, add_special_tokens=add_special_tokens)


def spans_of_ranges(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    ranges: Sequence[tuple[int, int]],  # characters [start, stop)
    *,
    add_special_tokens: bool = False,
) -> tuple[Span, ...]:
    """The tokens that have at least one character of each range. Raises RequestError."""
    if not tokenizer.is_fast:
        raise RequestError(
            f"{type(tokenizer).__name__} doesn't tell which characters a token stands for. Give spans as token ranges."
        )
    encoded = tokenizer(prompt, return_offsets_mapping=True, add_special_tokens=add_special_tokens)
    offsets = encoded["offset_mapping"]
    spans = []
    for start, stop in ranges:
        tokens = [place for place, (first, last) in enumerate(offsets) if first < stop and last > start]
        if not tokens:
            raise RequestError(
                f"no token stands for the characters {start} to {stop} of {prompt!r}. Give a range with some text."
            )
        spans.append((tokens[0], tokens[-1] + 1))
    return tuple(spans)
