"""Answers as a table, as JSON, or as text that grows."""

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from loraplex.cli.chatting.terminal import printable
from loraplex.cli.generating.rows import BASE, Row
from loraplex.engine.request import Delta, RequestResult
from loraplex.errors import LoraplexError

_HEADING = 200  # characters of a prompt above its answer

Event = tuple[int, Delta | RequestResult | LoraplexError]  # a row's number, and what became of it


def answers_as_json(row: Row, result: RequestResult) -> list[dict[str, Any]]:
    """One object for each answer."""
    auto = result.auto
    choice: dict[str, Any] = {"adapters": None if row.adapters == BASE else row.adapters}
    if auto is not None:
        choice = {"adapters": auto.name, "auto_score": auto.score}
    return [
        {
            "prompt": row.prompt,
            **choice,
            "text": answer.text.strip(),
            "finish_reason": answer.finish_reason,
            "num_tokens": len(answer.token_ids),
        }
        for answer in result.completions
    ]


def answer_table(rows: Sequence[Row], results: Sequence[RequestResult], seconds: float) -> Table:
    """Prompts, adapters and answers side by side."""
    num_tokens = sum(len(answer.token_ids) for result in results for answer in result.completions)
    table = Table(box=SIMPLE_HEAD, caption=f"{num_tokens / seconds:.0f} tokens/s", caption_justify="right")
    table.add_column("adapters", style="cyan", no_wrap=True)
    table.add_column("prompt", style="dim", ratio=1)
    table.add_column("answer", ratio=1)
    for row, result in zip(rows, results, strict=True):
        for answer in result.completions:
            table.add_row(Text(_shown_choice(row, result)), Text(str(row.prompt)), Text(answer.text.strip()))
    return table


def _shown_choice(row: Row, result: RequestResult) -> str:
    """What the row asked for, and what "auto" chose."""
    return row.adapters if result.auto is None else f"{row.adapters}: {result.auto.name or BASE}"


def write_json_lines(events: Iterable[Event], row_of: Callable[[int], Row | None], told: Callable[[str], str]) -> int:
    """A line for each answer, with all that its row's record holds; returns how many rows failed.

    A row that failed has a line with "error" in the place of its answers, its message as `told` has it.
    """
    num_failed = 0
    for number, event in events:
        if isinstance(event, Delta):
            continue
        row = row_of(number)
        record = {} if row is None else dict(row.record)
        error = event if isinstance(event, LoraplexError) else event.error
        if error is not None:
            num_failed += 1
            _write_line({**record, "error": told(str(error))})
        elif isinstance(event, RequestResult) and row is not None:
            for answer in answers_as_json(row, event):
                _write_line({**record, **({} if row.record else {"prompt": row.prompt}), **_without_prompt(answer)})
    return num_failed


def _without_prompt(answer: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in answer.items() if name != "prompt"}


def _write_line(content: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(content, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def write_text(events: Iterable[Event], rows: Sequence[Row], answers: int) -> None:
    """Each answer as it grows, below a heading where there are several. Raises the error of a row that failed.

    Of several answers to one row the later ones wait for the row's end. What "auto" chose goes to standard error.
    """
    has_headings = len(rows) * answers > 1
    waiting = [""] * answers  # of the row that is shown
    writer = _AnswerWriter(rows[0] if has_headings else None)
    for number, event in events:
        if isinstance(event, Delta):
            if event.index:
                waiting[event.index] += event.text
            else:
                writer.write(event.text)
            continue
        error = event if isinstance(event, LoraplexError) else event.error
        if error is not None:
            raise error
        writer.end()
        if isinstance(event, RequestResult) and event.auto is not None:
            sys.stderr.write(f"{printable(_shown_choice(rows[number], event))}\n")
        for text in waiting[1:]:
            writer = _AnswerWriter(rows[number])
            writer.write(text)
            writer.end()
        waiting = [""] * answers
        if number + 1 < len(rows):
            writer = _AnswerWriter(rows[number + 1])


class _AnswerWriter:
    """One answer on standard output."""

    def __init__(self, heading: Row | None) -> None:
        self._printable = printable if sys.stdout.isatty() else str
        self._has_text = False
        self._has_heading = heading is not None
        if heading is not None:
            prompt = " ".join(str(heading.prompt).split())[:_HEADING]
            console = Console(highlight=False, soft_wrap=True)
            console.print(Text.assemble((heading.adapters, "cyan"), "  ", (prompt, "dim")))

    def write(self, text: str) -> None:
        """A piece of it; the blanks that it begins with are left out."""
        shown = text if self._has_text else text.lstrip()
        self._has_text = self._has_text or bool(shown)
        sys.stdout.write(self._printable(shown))
        sys.stdout.flush()

    def end(self) -> None:
        sys.stdout.write("\n\n" if self._has_heading else "\n")
        sys.stdout.flush()
