"""A conversation: what was said, through which adapters the next answer comes, and the commands that change that."""

import json
import os
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from loraplex.cli.chatting.terminal import QUOTES, Terminal
from loraplex.cli.chatting.turns import BASE, AnswerPiece, ChatModel, Turn
from loraplex.cli.sampling import READERS
from loraplex.errors import ConfigError, LoraplexError, OutputError, RequestError
from loraplex.output_files import writing

HELP = f"""\
/adapters           what there is; /adapters NAME answers through it from now on:
                    a name, a link (a:0.7+b:0.3), {BASE} (the base model) or auto
/load NAME=FOLDER   load an adapter, a residual or a mixture
/again              answer the last question anew, through other adapters perhaps
/system TEXT        what the model is told first; without TEXT nothing
/set NAME VALUE     {", ".join(READERS)};
                    "default" as VALUE takes it back; /set shows what is set
/clear              forget the conversation
/save FILE          append the conversation to a file, as a record to train on
/exit               end (so does ctrl-D); ctrl-C stops an answer

{QUOTES} begins and ends a text of several lines.""".replace(
    ", repetition_penalty", ",\n                    repetition_penalty"
)


class Session:
    """Reads questions and commands until the input ends."""

    def __init__(
        self, model: ChatModel, terminal: Terminal, *, adapters: str, system: str | None, options: dict[str, Any]
    ) -> None:
        self._model = model
        self._terminal = terminal
        self._adapters = adapters
        self._system = system
        self._given = options  # by the command line
        self._options = dict(options)
        self._messages: list[dict[str, str]] = []
        self._commands: dict[str, Callable[[str], None]] = {
            "/adapters": self._choose,
            "/load": self._load,
            "/again": self._again,
            "/system": self._set_system,
            "/set": self._set,
            "/clear": self._clear,
            "/save": self._save,
            "/help": lambda text: self._terminal.tell(HELP),
        }

    def run(self) -> int:
        """The number of questions and commands that failed."""
        num_failed = 0
        while True:
            try:
                text = self._terminal.read(f"{self._adapters}> ").strip()
                if text == "/exit":
                    return num_failed
                self._take(text)
            except EOFError:
                self._terminal.tell("")
                return num_failed
            except KeyboardInterrupt:  # between answers
                if not self._terminal.is_interactive:
                    raise
                self._terminal.tell("\n(/exit or ctrl-D ends the chat)")
            except LoraplexError as error:
                num_failed += 1
                self._terminal.tell_error(error)

    def _take(self, text: str) -> None:
        name, _, rest = text.partition(" ")
        if name in self._commands:
            self._commands[name](rest.strip())
        elif name.startswith("/") and "/" not in name[1:]:  # a path may begin a question
            raise RequestError(f"there is no command {name}. /help lists those that there are.")
        elif text:
            self._messages.append({"role": "user", "content": text})
            self._answer()

    def _answer(self) -> None:
        """Answer the last question; one that can't be answered is taken back."""
        start = time.perf_counter()
        parts: list[str] = []
        last = AnswerPiece()
        try:
            with closing(self._model.answer(self._turn())) as pieces:  # type: ignore[type-var]
                for piece in pieces:
                    text = piece.text if parts else piece.text.lstrip()
                    if text:
                        parts.append(text)
                        self._terminal.show(text)
                    last = piece
        except KeyboardInterrupt:
            last = AnswerPiece(finish_reason="stopped")
        except LoraplexError:
            if parts:
                self._terminal.show("\n")
            self._messages.pop()
            raise
        self._terminal.show("\n")
        self._messages.append({"role": "assistant", "content": "".join(parts)})
        self._terminal.tell(_told(last, time.perf_counter() - start))

    def _turn(self) -> Turn:
        system = [] if self._system is None else [{"role": "system", "content": self._system}]
        return Turn(messages=system + self._messages, adapters=self._adapters, options=self._options)

    # Commands

    def _choose(self, text: str) -> None:
        names = self._model.names()
        if not text:
            self._terminal.tell("\n".join((BASE, *names)))
            return
        unknown = [part for part in _names_of(text) if part not in (*names, BASE, "auto")]
        if unknown:
            raise RequestError(f"{unknown[0]!r} is not loaded. There are: {', '.join((BASE, *names))}.")
        self._adapters = text

    def _load(self, text: str) -> None:
        name, equals, folder = text.partition("=")
        if not (name and equals and folder):
            raise RequestError(f"/load is {text!r}; write /load NAME=FOLDER.")
        self._model.load(name, folder)
        self._terminal.tell(f"{name} is loaded; /adapters {name} answers through it")

    def _again(self, text: str) -> None:
        answered = [*self._messages]
        while self._messages and self._messages[-1]["role"] == "assistant":
            self._messages.pop()
        if not self._messages:
            raise RequestError("there is no question yet.")
        try:
            self._answer()
        except LoraplexError:
            self._messages = answered
            raise

    def _set_system(self, text: str) -> None:
        self._system = text or None

    def _set(self, text: str) -> None:
        name, _, value = text.partition(" ")
        if not name:
            told = [f"{option} {self._options.get(option, 'default')}" for option in READERS]
            self._terminal.tell("\n".join(told))
            return
        if name not in READERS:
            raise ConfigError(f"/set knows no {name!r}; it knows {', '.join(READERS)}.")
        if value.strip() == "default":
            self._options.pop(name, None)
            self._options |= {name: self._given[name]} if name in self._given else {}
            return
        try:
            self._options[name] = READERS[name](value)
        except ValueError:
            raise ConfigError(f"{name} is {value!r}; it must be a number, or default.") from None

    def _clear(self, text: str) -> None:
        self._messages.clear()

    def _save(self, text: str) -> None:
        if not text:
            raise OutputError("/save needs a file. Write /save FILE.")
        path = Path(os.path.expanduser(text))
        record = json.dumps({"messages": self._turn().messages}, ensure_ascii=False)
        with writing(path), path.open("a", encoding="utf-8") as file:
            file.write(record + "\n")
        self._terminal.tell(f"{path}: {len(self._messages)} messages were appended")


def _names_of(choice: str) -> list[str]:
    return [part.partition(":")[0].strip() for part in choice.split("+")]


def _told(last: AnswerPiece, seconds: float) -> str:
    """How an answer came about, in a line."""
    told = [] if last.chosen is None else [f"auto: {last.chosen}"]
    if last.num_tokens is not None:
        told.append(f"{last.num_tokens} tokens, {last.num_tokens / seconds:.0f}/s")
    if last.finish_reason == "length":
        told.append("cut at max_tokens, /set changes it")
    if last.finish_reason == "stopped":
        told.append("stopped")
    return f"({'; '.join(told)})" if told else ""
