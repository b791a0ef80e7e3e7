"""Training files: JSON lines, each a conversation, a prompt with its completion, or a text."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from loraplex.errors import DatasetError
from loraplex.json_files import open_regular, parse_json, read_lines
from loraplex.validation import listed, quoted

FORMS = '{"messages": [...]}, {"prompt": "...", "completion": "..."} or {"text": "..."}'
_PART_BYTES = 1 << 20
Parsed = TypeVar("Parsed")
ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, kw_only=True)
class Record:
    """One line of a file: exactly one of the three forms. Keys of no form (an id, a source) are ignored."""

    place: str  # file:line
    messages: tuple[dict[str, Any], ...] | None = None
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None
    first_counted: int = 0  # of a conversation: the first message whose turns may count for the loss

    def counted_from(self, first: int) -> "Record":
        """The record, of whose conversation the assistant turns from message `first` on count.

        Raises DatasetError if there is none.
        """
        if self.messages is not None and not any(m["role"] == "assistant" for m in self.messages[first:]):
            raise DatasetError(f"{self.place}: none of the answer's messages is the assistant's.")
        return replace(self, first_counted=first)

    def last_turn_alone(self) -> "Record":
        """The record, of whose conversation only the last assistant turn counts."""
        roles = [message["role"] for message in self.messages or ()]
        last = max((number for number, role in enumerate(roles) if role == "assistant"), default=0)
        return replace(self, first_counted=max(last, self.first_counted))


def read_records(path: str | Path) -> list[Record]:
    """Read a JSONL file; blank lines are allowed. Raises DatasetError, which names file and line."""
    return read_lines_of(path, parse_record, FORMS)


def read_lines_of(path: str | Path, parse: Callable[[str, str], Parsed], forms: str) -> list[Parsed]:
    """What `parse` makes of every line and its place. Raises DatasetError."""
    path = Path(path)
    try:
        records = [parse(line, f"{path}:{number}") for number, line in read_lines(path)]
    except FileNotFoundError:
        raise DatasetError(
            f"the data file {str(path)!r} does not exist. Give the path of a JSONL file with records {forms}."
        ) from None
    except (OSError, ValueError) as error:
        raise DatasetError(f"the data file {str(path)!r} can't be read: {error}. It must be UTF-8 text.") from error
    if not records:
        raise DatasetError(f"the data file {str(path)!r} has no records. Write one a line: {forms}.")
    return records


def add_content(digest: "hashlib._Hash", path: str | Path) -> None:
    """Add a file's bytes to a digest. Raises DatasetError."""
    try:
        with open_regular(Path(path)) as file:
            while part := file.read(_PART_BYTES):
                digest.update(part)
    except (OSError, ValueError) as error:
        raise DatasetError(f"the data file {str(path)!r} can't be read: {error}.") from error


def parse_record(line: str, place: str) -> Record:
    """Read one line. Raises DatasetError."""
    try:
        content = parse_json(line)
    except ValueError as error:
        raise DatasetError(f"{place} is not JSON: {error}. Write one JSON object a line: {FORMS}.") from None
    if not isinstance(content, dict):
        raise DatasetError(f"{place} holds a JSON {type(content).__name__}; it must be an object: {FORMS}.")
    forms = [key for key in ("messages", "prompt", "text") if key in content]
    if len(forms) != 1:
        found = f"the keys [{listed(content)}]" if not forms else f"all of {forms}, which are different forms"
        raise DatasetError(f"{place} has {found}; a record is one of {FORMS}.")
    if "messages" in content:
        return Record(place=place, messages=_messages(content["messages"], place))
    if "text" in content:
        return Record(place=place, text=_string(content, "text", place))
    prompt, completion = _string(content, "prompt", place), _string(content, "completion", place)
    return Record(place=place, prompt=prompt, completion=completion)


def _messages(messages: object, place: str) -> tuple[dict[str, Any], ...]:
    if not isinstance(messages, list) or not messages:
        raise DatasetError(
            f"{place}: messages is {quoted(messages)}; it must be a list of "
            '{"role": ..., "content": ...} with at least one of the role "assistant".'
        )
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise DatasetError(
                f"{place}: message {number} is {quoted(message)}; it needs a role, one of {list(ROLES)}."
            )
        if not isinstance(message.get("content"), str):
            raise DatasetError(
                f"{place}: message {number} has the content {quoted(message.get('content'))}; it must be a string."
            )
    if not any(message["role"] == "assistant" for message in messages):
        raise DatasetError(
            f'{place}: no message has the role "assistant", so there is nothing to learn. Add the answer.'
        )
    return tuple(messages)


def _string(content: dict[str, Any], key: str, place: str) -> str:
    value = content.get(key)
    if not isinstance(value, str):
        raise DatasetError(f"{place}: {key} is {quoted(value)}; it must be a string. A record is one of {FORMS}.")
    if value == "" and key != "prompt":
        raise DatasetError(f"{place}: {key} is empty, so there is nothing to learn. Write it or remove the line.")
    return value
