"""What options and settings may be, whoever gives them: whole numbers, numbers that float32 can hold, short quotes."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from loraplex.errors import ConfigError, RequestError

FLOAT32_MAX = 3.4028234663852886e38
MAX_QUOTED = 300  # characters of a value in a message


def is_whole(value: object) -> bool:
    """Whether it is an int, and not True or False."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_finite(value: object) -> bool:
    """Whether it is a number that float32 can hold: all that is computed with settings is computed in float32."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -FLOAT32_MAX <= value <= FLOAT32_MAX


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
    """repr(value) for a message, cut where it is long."""
    if isinstance(value, str | bytes) and len(value) > MAX_QUOTED:
        return f"{value[:MAX_QUOTED]!r}... ({len(value)} in all)"
    if isinstance(value, int) and abs(value) >= 10**MAX_QUOTED:
        return f"a number of {int(math.log10(abs(value))) + 1} digits"
    text = repr(value)
    return text if len(text) <= MAX_QUOTED else f"{text[:MAX_QUOTED]}... ({len(text)} characters)"


def listed(names: Iterable[str], most: int = 5) -> str:
    """The first few of `names` in order, each in quotes, and how many there are if not all are shown."""
    names = sorted(names)
    shown = ", ".join(map(repr, names[:most]))
    return shown if len(names) <= most else f"{shown}, ... ({len(names)} in all)"
