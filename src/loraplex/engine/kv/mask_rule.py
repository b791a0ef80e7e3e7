"""Which earlier tokens a token sees, read off the rule that a base model's masks are made by.

A mask rule is a function of two positions. It is asked about single queries, so that windows and chunks of any length
are found without running the model on that many tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Row = Callable[[int], Tensor]  # of a query's position p, [p + 2] bool: which of the keys up to the next one it sees


@dataclass(frozen=True, kw_only=True)
class MaskRule:
    """A token sees itself and the tokens before it, of these."""

    window: int | None = None  # the last ones, itself included
    chunk: int | None = None  # those of its own chunk, which are all of this size

    def first(self, position: int) -> int:
        """The position of the first token that is seen."""
        first = 0 if self.window is None else max(0, position + 1 - self.window)
        return first if self.chunk is None else max(first, position // self.chunk * self.chunk)


def mask_rule_of(row: Row, length: int) -> MaskRule | None:
    """What a rule shows to sequences of up to `length` tokens; None for a rule that is none of these."""
    first = _first_seen(row, length - 1)
    if first is None:
        return None
    mask_rule = MaskRule()
    if first > 0:
        low, high = 0, length - 1  # the first query that doesn't see token 0
        while high - low > 1:
            middle = (low + high) // 2
            if _first_seen(row, middle) == 0:
                low = middle
            else:
                high = middle
        mask_rule = MaskRule(window=high) if _first_seen(row, high) == 1 else MaskRule(chunk=high)
    edge = mask_rule.window or mask_rule.chunk or length
    probes = {0, 1, 2, 3, 5, length // 3, length // 2, length - 2, length - 1}
    probes |= {times * edge + step for times in (1, 2, 3) for step in (-2, -1, 0, 1, 2)}
    if all(_first_seen(row, p) == mask_rule.first(p) for p in sorted(probes) if 0 <= p < length):
        return mask_rule
    return None


def _first_seen(row: Row, position: int) -> int | None:
    """The first key that a query sees, if it sees all from there up to itself and none behind; else None."""
    seen = row(position)
    first = int(seen.int().argmax())
    is_run = bool(seen[first : position + 1].all()) and not bool(seen[position + 1 :].any())
    return first if is_run and first <= position else None
