"""Options of the form NAME=VALUE."""

from collections.abc import Sequence
from pathlib import Path

import typer

from loraplex.adapters.leftovers import is_leftover, restore_all_replaced


def named_values(options: Sequence[str], flag: str) -> dict[str, str]:
    """Read repeated NAME=VALUE options; a wrong or repeated one is a usage error."""
    values: dict[str, str] = {}
    for option in options:
        name, equals, value = option.partition("=")
        if not (name and equals and value):
            raise typer.BadParameter(f"{option!r} is not NAME=VALUE, for example {flag} protein=path/to/folder")
        if name in values:
            raise typer.BadParameter(f"{flag} names {name!r} twice")
        values[name] = value
    return values


def adapters_in(folder: Path) -> dict[str, Path]:
    """Every folder of a LoRA or residual adapter directly below `folder`, by its name."""
    restore_all_replaced(folder)
    found = [*folder.glob("*/adapter_config.json"), *folder.glob("*/residual_config.json")]
    return {path.parent.name: path.parent for path in sorted(found) if not is_leftover(path.parent)}
