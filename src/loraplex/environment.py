"""Environment variables that loraplex reads itself. An empty value is the same as none."""

import os
from pathlib import Path

from loraplex.errors import ConfigError

ON = ("1", "true", "yes", "on")
OFF = ("0", "false", "no", "off")


def variable(name: str, default: str) -> str:
    """The variable's value, or `default` where it is not set or empty."""
    return os.environ.get(name, "").strip() or default


def switch(name: str, *, default: bool) -> bool:
    """Whether the variable is on. Raises ConfigError for a value that says neither."""
    text = variable(name, "").lower()
    if text in ON:
        return True
    if text in OFF:
        return False
    if text:
        raise ConfigError(
            f"the environment variable {name} is {os.environ[name]!r}; it must be one of {[*ON, *OFF]}, or not set."
        )
    return default


def cache_folder() -> Path:
    """The folder for everything loraplex keeps between runs: $LORAPLEX_CACHE, else ~/.cache/loraplex.

    Raises ConfigError where there is something else than a folder.
    """
    folder = Path(variable("LORAPLEX_CACHE", "~/.cache/loraplex")).expanduser()
    for path in (folder, *folder.parents):
        if path.is_dir():
            break
        if path.exists():
            raise ConfigError(
                f"the cache folder is {str(folder)!r}, but {str(path)!r} is no folder. Set LORAPLEX_CACHE to a folder, "
                "which need not exist yet."
            )
    return folder
