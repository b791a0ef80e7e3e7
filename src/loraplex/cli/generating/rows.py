"""What is to be answered: prompts with their adapters, from arguments, standard input or JSON lines."""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import typer

from loraplex.cli.generating.arrivals import as_they_come
from loraplex.cli.sampling import READERS
from loraplex.engine.request import Request
from loraplex.engine.sampling.params import SamplingParams
from loraplex.errors import DatasetError, LoraplexError
from loraplex.json_files import MAX_LINE_BYTES, lines_of, open_regular, parse_json

STANDARD = "-"  # standard input
BASE = "none"
FORMS = '{"prompt": "..."} or {"messages": [...]}, with "adapters" and options of sampling besides'
SAMPLING = (*READERS, "stop")  # of a line


@dataclass(frozen=True, kw_only=True)
class Row:
    """One request before it is made."""

    prompt: str | Sequence[Mapping[str, Any]]  # messages: of a chat, which a user's ends
    adapters: str = BASE
    options: Mapping[str, Any] = field(default_factory=dict)  # of sampling, beside the command's
    record: Mapping[str, Any] = field(default_factory=dict)  # the line that it came from

    def request(self, options: Mapping[str, Any], *, system: str | None, raw: bool) -> Request:
        """Raises RequestError for options that can't be."""
        sampling = SamplingParams(**{**options, **self.options})
        return Request(
            self._prompt(system, raw), adapters=None if self.adapters == BASE else self.adapters, sampling=sampling
        )

    def _prompt(self, system: str | None, raw: bool) -> str | list[Mapping[str, Any]]:
        if isinstance(self.prompt, str) and raw:
            return self.prompt
        messages: list[Mapping[str, Any]] = (
            [{"role": "user", "content": self.prompt}] if isinstance(self.prompt, str) else [*self.prompt]
        )
        has_own = any(message.get("role") == "system" for message in messages)
        return messages if system is None or has_own else [{"role": "system", "content": system}, *messages]


def pair_rows(prompts: Sequence[str], adapters: Sequence[str]) -> list[Row]:
    """Prompts with their adapters: equally many of both, one prompt for all, or base rows only."""
    if not adapters:
        return [Row(prompt=prompt) for prompt in prompts]
    if len(prompts) == 1:
        return [Row(prompt=prompts[0], adapters=choice) for choice in adapters]
    if len(prompts) != len(adapters):
        raise typer.BadParameter(
            f"{len(prompts)} prompts but {len(adapters)} --adapters: give one for each prompt, or one prompt for all"
        )
    return [Row(prompt=prompt, adapters=choice) for prompt, choice in zip(prompts, adapters, strict=True)]


def read_prompts(prompts: Sequence[str]) -> list[str]:
    """The prompts, "-" being standard input as a whole, as it is where nothing else is given."""
    if not prompts and sys.stdin.isatty():
        raise typer.BadParameter("there is nothing to answer: give a prompt, - for standard input, or --input FILE")
    given = list(prompts) or [STANDARD]
    if given.count(STANDARD) > 1:
        raise typer.BadParameter("standard input (-) can be one prompt only")
    return [_standard_input() if prompt == STANDARD else prompt for prompt in given]


def _standard_input() -> str:
    content = sys.stdin.buffer.read(MAX_LINE_BYTES + 1)
    if len(content) > MAX_LINE_BYTES:
        raise DatasetError(f"standard input has more than the {MAX_LINE_BYTES} bytes that are read as a prompt.")
    try:
        return content.decode("utf-8-sig").rstrip("\n")
    except ValueError as error:
        raise DatasetError(f"standard input is no UTF-8 text: {error}.") from None


def read_rows(source: str, adapters: str) -> Iterator[Row | LoraplexError | None]:
    """The rows of a JSON lines file, or of standard input as they come; an error for a line that is none.

    None: there is no row yet, but there may be some; who writes them may wait for the answers to those before.
    `adapters` are those of lines that name none. Raises DatasetError where the file can't be read.
    """
    try:
        if source == STANDARD:
            yield from as_they_come(_rows(_standard_lines(), "standard input", adapters))
        else:
            with open_regular(Path(source)) as file:
                yield from _rows(file, source, adapters)
    except (OSError, ValueError) as error:
        raise DatasetError(f"--input {source!r} can't be read: {error}.") from error


def _standard_lines() -> BinaryIO:
    """Standard input under another descriptor: Python can't end while a thread still reads its own `sys.stdin`."""
    try:
        return os.fdopen(os.dup(sys.stdin.fileno()), "rb")
    except OSError:  # it is no file
        return sys.stdin.buffer


def _rows(stream: BinaryIO, name: str, adapters: str) -> Iterator[Row | LoraplexError]:
    for number, line in lines_of(stream):
        try:
            yield _row(line, f"{name}:{number}", adapters)
        except LoraplexError as error:
            yield error


def _row(line: str, place: str, adapters: str) -> Row:
    try:
        record = parse_json(line)
    except ValueError as error:
        raise DatasetError(f"{place} is not JSON: {error}. Write one object a line: {FORMS}.") from None
    if not isinstance(record, dict) or ("prompt" in record) == ("messages" in record):
        raise DatasetError(f"{place} is no row. Write {FORMS}.")
    prompt = record.get("prompt")
    if "messages" in record:
        prompt = _question(record["messages"], place)
    elif not isinstance(prompt, str):
        raise DatasetError(f"{place}: prompt is no text. Write {FORMS}.")
    own = record.get("adapters")
    if own is not None and not isinstance(own, str):
        raise DatasetError(f'{place}: adapters is no text; write a name, a link, "{BASE}" or "auto".')
    options = {name: record[name] for name in SAMPLING if record.get(name) is not None}
    return Row(prompt=prompt, adapters=own or adapters, options=options, record=record)


def _question(messages: Any, place: str) -> list[Mapping[str, Any]]:
    """A conversation without the answer that it ends with, as records to train on do."""
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise DatasetError(f"{place}: messages is no list of objects. Write {FORMS}.")
    return messages[:-1] if messages[-1].get("role") == "assistant" else messages
