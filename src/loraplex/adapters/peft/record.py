"""loraplex.json: what an adapter's folder says beyond PEFT's settings, which PEFT does not look at."""

import json
from pathlib import Path

from loraplex.errors import AdapterFormatError, UnsupportedAdapterError
from loraplex.json_files import read_object

RECORD_FILE = "loraplex.json"
_VERSION = 1
_MAX = 64  # end tokens


def write_record(folder: Path, end_tokens: tuple[int, ...]) -> None:
    """Write what ends the adapter's answers; nothing, where that is not known."""
    if end_tokens:
        content = {"format_version": _VERSION, "end_tokens": list(end_tokens)}
        (folder / RECORD_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_record(folder: Path) -> tuple[int, ...]:
    """The tokens that end the adapter's answers; none without the file.

    Raises AdapterFormatError, or UnsupportedAdapterError for another version or an unknown key.
    """
    file = folder / RECORD_FILE
    if not file.is_file():
        return ()
    content = read_object(file, AdapterFormatError)
    if content.get("format_version") != _VERSION:
        found = content.get("format_version")
        raise UnsupportedAdapterError(f"{file} has format_version {found!r}; this loraplex reads version {_VERSION}.")
    if content.keys() != {"format_version", "end_tokens"}:
        raise UnsupportedAdapterError(f"{file} has the keys {sorted(content)}; known: format_version and end_tokens.")
    tokens = content["end_tokens"]
    if not (isinstance(tokens, list) and len(tokens) <= _MAX and all(map(_is_token, tokens))):
        raise AdapterFormatError(f"{file}: end_tokens is not a list of at most {_MAX} token ids.")
    return tuple(tokens)


def _is_token(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31
