"""Checks of options, with messages that name the option, its value and what is possible."""

import math

from loraplex.errors import ConfigError


def check_whole(config: object, options: tuple[str, ...], *, minimum: int, optional: bool = False) -> None:
    """Raise ConfigError unless the options are whole numbers of at least `minimum`, or None if `optional`."""
    for option in options:
        value = getattr(config, option)
        if value is None and optional:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise ConfigError(f"{option} is {value!r}; it must be a whole number of at least {minimum}.")


def check_flags(config: object, options: tuple[str, ...]) -> None:
    """Raise ConfigError unless the options are True or False."""
    for option in options:
        if not isinstance(getattr(config, option), bool):
            raise ConfigError(f"{option} is {getattr(config, option)!r}; it must be True or False.")


def check_number(
    label: str,
    option: str,
    value: object,
    *,
    minimum: float = -math.inf,
    above: float = -math.inf,
    below: float = math.inf,
) -> None:
    """Raise ConfigError, which starts with `label`, unless the value is a number within the bounds."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and minimum <= value and above < value < below):  # type: ignore[operator]
        bounds = [f"at least {minimum}" if minimum > -math.inf else f"above {above}"]
        bounds += [f"below {below}"] if below < math.inf else ["finite"]
        raise ConfigError(f"{label}: {option} is {value!r}; it must be a number {' and '.join(bounds)}.")
