"""Checks of options, with messages that name the option, its value and what is possible."""

import math

from loraplex.errors import ConfigError
from loraplex.validation import is_finite, is_whole, quoted

MAX_STEPS = 10**8  # years
MAX_COUNT = 2**31 - 1
MAX_LEARNING_RATE = 100.0  # AdamW moves each weight by about so much a step: beyond, nothing is learnt


def check_num_steps(label: str, num_steps: int) -> None:
    """Raise ConfigError, which starts with `label`, for more steps than anybody waits for."""
    if num_steps > MAX_STEPS:
        raise ConfigError(
            f"{label}: it would take {quoted(num_steps)} steps; at most {MAX_STEPS} are possible. Lower max_steps or "
            "epochs."
        )


def check_learning_rate(label: str, rate: object) -> None:
    """Raise ConfigError, which starts with `label`, for a rate that nothing is learnt with."""
    check_number(label, "learning_rate", rate, above=0)
    if rate > MAX_LEARNING_RATE:  # type: ignore[operator]
        raise ConfigError(
            f"{label}: learning_rate is {rate!r}; it must be at most {MAX_LEARNING_RATE:g}. Usual is 1e-4."
        )


def check_whole(
    config: object, options: tuple[str, ...], *, minimum: int, maximum: int = MAX_COUNT, optional: bool = False
) -> None:
    """Raise ConfigError unless the options are whole numbers within the bounds, or None if `optional`."""
    for option in options:
        value = getattr(config, option)
        if value is None and optional:
            continue
        if not (is_whole(value) and minimum <= value):
            raise ConfigError(f"{option} is {quoted(value)}; it must be a whole number of at least {minimum}.")
        if value > maximum:
            raise ConfigError(f"{option} is {quoted(value)}; it must be a whole number of at most {maximum}.")


def check_flags(config: object, options: tuple[str, ...]) -> None:
    """Raise ConfigError unless the options are True or False."""
    for option in options:
        if not isinstance(getattr(config, option), bool):
            raise ConfigError(f"{option} is {quoted(getattr(config, option))}; it must be True or False.")


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
    if not (is_finite(value) and minimum <= value and above < value < below):  # type: ignore[operator]
        bounds = [f"at least {minimum}" if minimum > -math.inf else f"above {above}"]
        bounds += [f"below {below}"] if below < math.inf else ["finite"]
        raise ConfigError(f"{label}: {option} is {quoted(value)}; it must be a number {' and '.join(bounds)}.")
