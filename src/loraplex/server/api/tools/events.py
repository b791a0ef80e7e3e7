"""What reading an answer's text gives: content, and calls that begin and go on."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True)
class ContentPiece:
    """Text that is no call's."""

    text: str


@dataclass(frozen=True)
class CallBegin:
    """A call of a tool; calls are counted from 0 on."""

    index: int
    name: str


@dataclass(frozen=True)
class ArgumentsPiece:
    """More of the JSON of a call's arguments."""

    index: int
    text: str


ToolEvent = ContentPiece | CallBegin | ArgumentsPiece


class ToolParser(Protocol):
    """Reads one answer; what its text says doesn't depend on the pieces in which it comes."""

    is_in_call: bool  # the arguments of the last call are not complete

    def feed(self, text: str) -> list[ToolEvent]: ...

    def end(self) -> list[ToolEvent]: ...


@dataclass
class ReadCall:
    """One call of an answer."""

    name: str
    arguments: str = ""


@dataclass
class ReadAnswer:
    """A whole answer: its content, and its calls in order."""

    content: str = ""
    calls: list[ReadCall] = field(default_factory=list)
    is_cut: bool = False  # in the last call

    @classmethod
    def of_events(cls, events: Iterable[ToolEvent]) -> "ReadAnswer":
        answer = cls()
        for event in events:
            match event:
                case ContentPiece(text):
                    answer.content += text
                case CallBegin(_, name):
                    answer.calls.append(ReadCall(name))
                case ArgumentsPiece(index, text):
                    answer.calls[index].arguments += text
        return answer


def read_answer(parser: ToolParser, text: str) -> ReadAnswer:
    answer = ReadAnswer.of_events([*parser.feed(text), *parser.end()])
    answer.is_cut = parser.is_in_call
    return answer


def joined(events: Iterable[ToolEvent]) -> list[ToolEvent]:
    """The same with neighbouring pieces of one text as one."""
    found: list[ToolEvent] = []
    for event in events:
        last = found[-1] if found else None
        if isinstance(event, ContentPiece) and isinstance(last, ContentPiece):
            found[-1] = ContentPiece(last.text + event.text)
        elif isinstance(event, ArgumentsPiece) and isinstance(last, ArgumentsPiece) and event.index == last.index:
            found[-1] = ArgumentsPiece(event.index, last.text + event.text)
        else:
            found.append(event)
    return found
