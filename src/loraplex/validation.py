"""What options and settings may be, whoever gives them: whole numbers, numbers that float32 can hold, short quotes."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from loraplex.errors import ConfigError, RequestError

FLOAT32_MAX = 3.4028234663852886e38
MAX_QUOTED = 300  # characters of a value in a message
_BRACKETS: dict[type, tuple[str, str]] = {
    dict: ("{", "}"),
    list: ("[", "]"),
    tuple: ("(", ")"),
    set: ("{", "}"),
    frozenset: ("frozenset({", "})"),
}


def is_whole(value: object) -> bool:
    """Whether it is an int, and not True or False."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_finite(value: object) -> bool:
    """Whether it is a number that float32 can hold: all that is computed with settings is computed in float32.

    A whole number must have 64 bits at most, as torch wants it beside tensors.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    most = FLOAT32_MAX if isinstance(value, float) else 2**63 - 1
    return -most <= value <= most


def check_least(settings: object, least: Mapping[str, float]) -> None:
    """Raise ConfigError for a setting that is below its least value, infinite or NaN."""
    for name, value in least.items():
        if not value <= getattr(settings, name) < math.inf:
            raise ConfigError(f"{name} is {getattr(settings, name)!r}; it must be at least {value:g} and finite.")


def check_text(text: str) -> None:
    """Raise RequestError for half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"the prompt can't be read: its character {error.start}, {text[error.start]!r}, is half of a surrogate "
            "pair, which no text has alone. Leave it out, or give the whole character."
        ) from None


def quoted(value: Any) -> str:
    """repr(value) for a message, cut where it is long; what isn't shown costs nothing, however large or deep it is."""
    if isinstance(value, str | bytes) and len(value) > MAX_QUOTED:
        return f"{value[:MAX_QUOTED]!r}... ({len(value)} in all)"
    shown: list[str] = []
    length = 0
    unread: list[Iterator[str | _Inner]] = [iter([_Inner(value)])]
    while unread and length <= MAX_QUOTED:
        piece = next(unread[-1], None)
        if piece is None:
            unread.pop()
        elif isinstance(piece, _Inner):
            unread.append(_pieces(piece.value))
        else:
            shown.append(piece)
            length += len(piece)
    text = "".join(shown)
    return text if length <= MAX_QUOTED else f"{text[:MAX_QUOTED]}..."


class _Inner(NamedTuple):
    """A value inside another, not yet written out."""

    value: Any


def _pieces(value: Any) -> "Iterator[str | _Inner]":
    """repr(value), one piece after the other."""
    if type(value) in _BRACKETS and value:
        opening, closing = _BRACKETS[type(value)]
        yield opening
        for number, inner in enumerate(value):
            yield ", " if number else ""
            yield _Inner(inner)
            if type(value) is dict:
                yield ": "
                yield _Inner(value[inner])
        yield ",)" if type(value) is tuple and len(value) == 1 else closing
    elif isinstance(value, str | bytes):
        yield repr(value[: MAX_QUOTED + 1])
    elif isinstance(value, int) and abs(value) >= 10**MAX_QUOTED:
        yield f"a number of {int(math.log10(abs(value))) + 1} digits"
    else:
        yield repr(value)


def listed(names: Iterable[str], most: int = 5) -> str:
    """The first few of `names` in order, each in quotes, and how many there are if not all are shown."""
    names = sorted(names)
    shown = ", ".join(map(repr, names[:most]))
    return shown if len(names) <= most else f"{shown}, ... ({len(names)} in all)"
