"""Answers of /v1/chat/completions: messages and deltas, with the calls of tools that are read from their texts."""

from typing import Any

from loraplex.server.api.tools.events import ArgumentsPiece, CallBegin, ContentPiece, ToolEvent, ToolParser, read_answer
from loraplex.server.api.tools.templates import ToolTemplate
from loraplex.server.api.tools.use import ToolUse, call_id


class ChatAnswers:
    """The answers of one request."""

    def __init__(self, use: ToolUse, template: ToolTemplate) -> None:
        self._use = use
        self._template = template
        self._streams: dict[int, _Stream] = {}

    def message(self, text: str, finish_reason: str) -> tuple[dict[str, Any], str]:
        """A whole answer's message, and why it ended."""
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        parser = self._use.parser(self._template)
        if parser is None:
            return message, finish_reason
        answer = read_answer(parser, text)
        message["content"] = answer.content or (None if answer.calls else "")
        if answer.calls:
            message["tool_calls"] = [
                {
                    "id": call_id(self._template),
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in answer.calls
            ]
        return message, _reason(finish_reason, called=bool(answer.calls) and not answer.is_cut)

    def delta(self, index: int, text: str, finish_reason: str | None) -> tuple[dict[str, Any], str | None]:
        """What is new of one answer, and why it ended if it has."""
        delta: dict[str, Any] = {}
        stream = self._streams.get(index)
        if stream is None:
            stream = self._streams[index] = _Stream(self._use.parser(self._template), self._template)
            delta = {"role": "assistant", "content": ""}
        delta |= stream.delta(text, is_end=finish_reason is not None)
        return delta, None if finish_reason is None else _reason(finish_reason, called=stream.has_whole_calls)


class _Stream:
    """One answer as it comes."""

    def __init__(self, parser: ToolParser | None, template: ToolTemplate) -> None:
        self._parser = parser
        self._template = template
        self.has_called = False

    @property
    def has_whole_calls(self) -> bool:
        return self.has_called and self._parser is not None and not self._parser.is_in_call

    def delta(self, text: str, *, is_end: bool) -> dict[str, Any]:
        if self._parser is None:
            return {"content": text} if text else {}
        events = self._parser.feed(text)
        return self._told([*events, *self._parser.end()] if is_end else events)

    def _told(self, events: list[ToolEvent]) -> dict[str, Any]:
        content, calls = "", dict[int, dict[str, Any]]()
        for event in events:
            match event:
                case ContentPiece(text):
                    content += text
                case CallBegin(index, name):
                    self.has_called = True
                    calls[index] = {
                        "index": index,
                        "id": call_id(self._template),
                        "type": "function",
                        "function": {"name": name, "arguments": ""},
                    }
                case ArgumentsPiece(index, text):
                    call = calls.setdefault(index, {"index": index, "function": {"arguments": ""}})
                    call["function"]["arguments"] += text
        delta: dict[str, Any] = {"content": content} if content else {}
        return delta | ({"tool_calls": list(calls.values())} if calls else {})


def _reason(finish_reason: str, *, called: bool) -> str:
    return "tool_calls" if called and finish_reason == "stop" else finish_reason
