"""The one reader for text and JSON from outside: regular files, bounded in size and depth, ValueError for the rest."""

import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from loraplex.errors import LoraplexError
from loraplex.validation import quoted

MAX_BYTES = 256 << 20  # the largest tokenizers have tens of megabytes
MAX_SETTINGS_BYTES = 4 << 20  # of an adapter, with patterns for each of 20,000 modules
MAX_LINE_BYTES = 16 << 20  # of JSON lines
MAX_DEPTH = 64  # lists and objects in one another; known formats have ten at most
MAX_DIGITS = 308  # of a whole number: what a float can hold

_STRING_OR_BRACKET = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[\]{}]', re.DOTALL)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_BOM = "\ufeff"


@contextmanager
def damaged_as(error: type[LoraplexError], what: object) -> Iterator[None]:
    """Inside the block, what the system and the libraries raise for damaged and unreadable files becomes `error`."""
    try:
        yield
    except (OSError, ValueError, OverflowError, RuntimeError, MemoryError) as raised:  # RuntimeError: endless links
        raise error(
            f"{quoted(str(what))} can't be read: {type(raised).__name__}: {raised}. Restore it, or choose another."
        ) from raised


@contextmanager
def open_regular(file: Path) -> Iterator[BufferedReader]:
    """Open a file to read; a pipe or a device, which may never end, is a ValueError."""
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe without a writer would wait
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError("it is no regular file")
    with os.fdopen(descriptor, "rb") as opened:
        yield opened


def read_text(file: Path, max_bytes: int = MAX_BYTES) -> str:
    """The content of a UTF-8 file, without a byte order mark. Raises OSError or ValueError."""
    with open_regular(file) as opened:
        size = os.fstat(opened.fileno()).st_size
        if size > max_bytes:
            raise ValueError(f"it has {size} bytes, more than the {max_bytes} that are read")
        content = opened.read(max_bytes)
    return content.decode("utf-8-sig")


def read_lines(file: Path) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file that aren't blank, with their numbers from 1 on. Raises OSError or ValueError."""
    with open_regular(file) as opened:
        yield from lines_of(opened)


def lines_of(stream: BinaryIO) -> Iterator[tuple[int, str]]:
    """The same of what is open already, a pipe perhaps, each line as it comes."""
    number = 0
    while line := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            raise ValueError(f"line {number} has more than the {MAX_LINE_BYTES} bytes that are read")
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        if text.strip():
            yield number, text


def read_json(file: Path, *, finite: bool = True, max_bytes: int = MAX_BYTES) -> Any:
    """The content of a JSON file. Raises OSError or ValueError; see `parse_json`."""
    return parse_json(read_text(file, max_bytes), finite=finite)


def read_object(
    file: Path, error: type[LoraplexError], *, finite: bool = True, max_bytes: int = MAX_SETTINGS_BYTES
) -> dict[str, Any]:
    """The JSON object of a file of settings. Raises `error`."""
    try:
        content = read_json(file, finite=finite, max_bytes=max_bytes)
    except (OSError, ValueError) as raised:
        raise error(f"{file} can't be read as JSON: {raised}. Restore or write it again.") from raised
    if not isinstance(content, dict):
        raise error(f"{file} holds a {type(content).__name__}; settings are one JSON object.")
    return content


def parse_json(text: str, *, finite: bool = True) -> Any:
    """The content of JSON text; `finite` refuses NaN, infinities and numbers too large to be anything else.

    Raises ValueError: not JSON, nested more than MAX_DEPTH deep, or with strings that are no Unicode text.
    """
    text = text.removeprefix(_BOM)
    _check_depth(text)
    try:
        if finite:
            content = json.loads(text, parse_constant=_refuse, parse_float=_finite, parse_int=_whole)
        else:
            content = json.loads(text)
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
    raise ValueError(f"it holds the number {constant[:40]}; numbers must be finite")


def _finite(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        _refuse(digits)
    return value


def _whole(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        _refuse(digits)
    return int(digits)
