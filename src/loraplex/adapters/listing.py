"""Name a few of many offenders in an error message."""

from collections.abc import Iterable


def listed(names: Iterable[str], most: int = 5) -> str:
    """The first few of `names` in order, each in quotes, and how many there are if not all are shown."""
    names = sorted(names)
    shown = ", ".join(map(repr, names[:most]))
    return shown if len(names) <= most else f"{shown}, ... ({len(names)} in all)"
