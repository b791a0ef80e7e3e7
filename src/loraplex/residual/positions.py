"""Which tokens of a row a residual acts on: by their places in the row, padding not counted."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from loraplex.errors import ConfigError
from loraplex.validation import is_whole, quoted

MAX_EDGE = 1 << 20  # tokens
_EDGES = re.compile(r"(?:f(\d{1,7}))?\+?(?:l(\d{1,7}))?")

Interval = tuple[int, int | None]  # [start, stop) in a row's tokens; None: up to its end


@dataclass(frozen=True)
class Positions:
    """All tokens, those of the prompt, the generated ones, or the first and last of the prompt.

    Of `edges`, half of the prompt's tokens are taken at most on either side, as pyreft does it
    (`get_intervention_locations`): a prompt of one token has none.
    """

    which: Literal["all", "prompt", "generated", "edges"] = "all"
    first: int = 0  # of "edges"
    last: int = 0

    def __post_init__(self) -> None:
        if self.which not in ("all", "prompt", "generated", "edges"):
            raise ConfigError(f"positions are {quoted(self.which)}; known: all, prompt, generated, f7, l7 and f7+l7.")
        numbers = (self.first, self.last)
        if not all(is_whole(number) and 0 <= number <= MAX_EDGE for number in numbers):
            raise ConfigError(f"positions have first={quoted(self.first)} and last={quoted(self.last)}; give tokens.")
        if (self.which == "edges") != any(numbers):
            raise ConfigError("positions have first and last tokens if and only if they are edges, such as f7+l7.")

    def __str__(self) -> str:
        if self.which != "edges":
            return self.which
        return "+".join(f"{letter}{n}" for letter, n in (("f", self.first), ("l", self.last)) if n)

    @property
    def depends_on_prompt(self) -> bool:
        """Whether one must know where the prompt ends."""
        return self.which != "all"

    def intervals(self, num_prompt: int) -> list[Interval]:
        """The tokens meant, in a row whose prompt has `num_prompt`."""
        if self.which == "all":
            return [(0, None)]
        if self.which == "prompt":
            return [(0, num_prompt)]
        if self.which == "generated":
            return [(num_prompt, None)]
        half = num_prompt // 2
        return [(0, min(self.first, half)), (num_prompt - min(self.last, half), num_prompt)]


ALL = Positions()


def parse_positions(text: object) -> Positions:
    """Positions by their text: "all", "prompt", "generated", "f7", "l7" or "f7+l7". Raises ConfigError."""
    if isinstance(text, Positions):
        return text
    if text in ("all", "prompt", "generated"):
        return Positions(text)
    match = _EDGES.fullmatch(text) if isinstance(text, str) and text else None
    if match is None or not any(match.groups()) or (None not in match.groups()) != ("+" in str(text)):
        raise ConfigError(
            f"positions are {quoted(text)}; known: 'all', 'prompt', 'generated', or the first and last tokens of the "
            "prompt, such as 'f7', 'l7' or 'f7+l7'."
        )
    return Positions("edges", *(int(number or 0) for number in match.groups()))


@dataclass(frozen=True)
class PositionSegment:
    """Tokens [start, stop) of a row on which the same positions are active."""

    start: int
    stop: int
    active: frozenset[Positions]


def segments(positions: Sequence[Positions], start: int, stop: int, num_prompt: int) -> list[PositionSegment]:
    """The tokens [start, stop) of a row, cut where other positions become active; without those that none is on."""
    meant = {one: one.intervals(num_prompt) for one in positions}
    edges = {edge for all_ in meant.values() for pair in all_ for edge in pair if edge is not None}
    cuts = [start, *sorted(edge for edge in edges if start < edge < stop), stop]
    found = []
    for first, last in pairwise(cuts):
        active = frozenset(one for one, all_ in meant.items() if any(_holds(pair, first) for pair in all_))
        if active and first < last:
            found.append(PositionSegment(first, last, active))
    return found


def _holds(interval: Interval, token: int) -> bool:
    start, stop = interval
    return start <= token and (stop is None or token < stop)
