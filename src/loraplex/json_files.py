"""The one reader for JSON from outside: bounded in size and depth, and a ValueError for whatever is wrong."""

import json
import re
from pathlib import Path
from typing import Any, NoReturn

MAX_BYTES = 256 << 20  # the largest tokenizers have tens of megabytes
MAX_DEPTH = 64  # lists and objects in one another; known formats have ten at most

_STRING_OR_BRACKET = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[\]{}]', re.DOTALL)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_json(file: Path, *, finite: bool = True) -> Any:
    """The content of a JSON file. Raises OSError or ValueError; see `parse_json`."""
    size = file.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"it has {size} bytes, more than the {MAX_BYTES} that are read")
    return parse_json(file.read_text(encoding="utf-8"), finite=finite)


def parse_json(text: str, *, finite: bool = True) -> Any:
    """The content of JSON text; `finite` refuses NaN, infinities and numbers too large to be anything else.

    Raises ValueError: not JSON, nested more than MAX_DEPTH deep, or with strings that are no Unicode text.
    """
    _check_depth(text)
    try:
        content = json.loads(text, parse_constant=_refuse, parse_float=_finite) if finite else json.loads(text)
    except RecursionError as error:  # the caller's own stack was nearly full
        raise ValueError("it is nested too deeply") from error
    if _SURROGATE.search(text):
        _check_text(content)
    return content


def _check_depth(text: str) -> None:
    if text.count("[") + text.count("{") <= MAX_DEPTH:  # the common case, in one fast search
        return
    depth = 0
    for match in _STRING_OR_BRACKET.finditer(text):
        first = match[0][0]
        if first in "[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise ValueError(f"it is nested more than {MAX_DEPTH} deep (at character {match.start()})")
        elif first in "]}":
            depth -= 1


def _check_text(content: Any) -> None:
    """Half a surrogate pair is no character: no tokenizer and no file could take it."""
    try:
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"a string holds half of a surrogate pair ({error.object[error.start]!a})") from None


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"it holds the number {constant}; numbers must be finite")


def _finite(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        _refuse(digits)
    return value
