"""A terminal that a chat runs in: lines that are typed, with a history; text that is shown as it comes."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console

from loraplex.errors import LoraplexError

QUOTES = '"""'  # before and behind a text of several lines
_MORE = "... "
_HISTORY_LINES = 1000
# A model's text must not steer the terminal: control characters but for tabs and line ends, and C1.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Terminal:
    """Standard input and output; without a terminal, questions are the lines of the input, and answers plain text."""

    def __init__(self, history: Path | None = None) -> None:
        self.is_interactive = sys.stdin.isatty()
        self._console = Console(highlight=False, markup=False, soft_wrap=True)
        self._errors = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
        self._history = history if self.is_interactive else None

    @contextmanager
    def editing(self) -> Iterator[None]:
        """Inside the block lines can be edited, and those of earlier chats come back with the arrow keys."""
        if not self.is_interactive:
            yield
            return
        with suppress(ImportError):  # of a Python without it: lines are read all the same
            import readline

            readline.set_history_length(_HISTORY_LINES)
            if self._history is not None:
                with suppress(OSError):
                    readline.read_history_file(self._history)
        try:
            yield
        finally:
            self._keep_history()

    def read(self, prompt: str) -> str:
        """What was typed: a line, or several in triple quotes. Raises EOFError and KeyboardInterrupt."""
        first = self._line(prompt)
        if not first.lstrip().startswith(QUOTES):
            return first
        lines = [first.lstrip().removeprefix(QUOTES)]
        while not lines[-1].rstrip().endswith(QUOTES):
            lines.append(self._line(_MORE))
        return "\n".join(lines).rstrip().removesuffix(QUOTES)

    def show(self, text: str) -> None:
        """A piece of an answer, at once."""
        sys.stdout.write(printable(text))
        sys.stdout.flush()

    def tell(self, text: str) -> None:
        """A line about the chat, which is none of its answers."""
        if self.is_interactive:
            self._console.print(printable(text), style="dim")

    def tell_error(self, error: LoraplexError) -> None:
        self._errors.print(f"Error: {printable(str(error))}", style="red")

    def _line(self, prompt: str) -> str:
        return input(prompt if self.is_interactive else "")

    def _keep_history(self) -> None:
        if self._history is None:
            return
        with suppress(ImportError, OSError):
            import readline

            self._history.parent.mkdir(parents=True, exist_ok=True)
            self._history.touch(mode=0o600)
            readline.write_history_file(self._history)


def printable(text: str) -> str:
    """The text without characters that steer a terminal."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)
