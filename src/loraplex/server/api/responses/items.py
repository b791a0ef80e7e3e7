"""An answer as output items: messages and calls of functions, with the events that tell how they grow."""

import secrets
from collections.abc import Sequence
from typing import Any

from loraplex.server.api.tools.events import ArgumentsPiece, CallBegin, ContentPiece, ToolEvent
from loraplex.server.api.tools.templates import ToolTemplate
from loraplex.server.api.tools.use import call_id

Event = dict[str, Any]  # with its type


class OutputItems:
    """The items of one answer; each `add` gives the events of what is new."""

    def __init__(self, template: ToolTemplate) -> None:
        self.items: list[dict[str, Any]] = []
        self._template = template
        self._is_open = False  # the last one

    def add(self, events: Sequence[ToolEvent]) -> list[Event]:
        told: list[Event] = []
        for event in events:
            match event:
                case ContentPiece(text):
                    if not (self._is_open and self.items[-1]["type"] == "message"):
                        told += [*self._close("completed"), *self._open_message()]
                    told.append(self._add_text(text))
                case CallBegin(_, name):
                    told += [*self._close("completed"), *self._open_call(name)]
                case ArgumentsPiece(_, text):
                    self.items[-1]["arguments"] += text
                    told.append(self._event("response.function_call_arguments.delta", delta=text))
        return told

    def end(self, *, is_complete: bool) -> list[Event]:
        """An answer without any text is an empty message."""
        opened = [] if self.items else self._open_message()
        return [*opened, *self._close("completed" if is_complete else "incomplete")]

    def _open_message(self) -> list[Event]:
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        item = {"id": f"msg_{secrets.token_hex(12)}", "type": "message", "role": "assistant"}
        added = self._open(item | {"status": "in_progress", "content": []})
        self.items[-1]["content"].append(part)
        return [added, self._part_event("response.content_part.added", part=dict(part))]

    def _open_call(self, name: str) -> list[Event]:
        item = {"id": f"fc_{secrets.token_hex(12)}", "type": "function_call", "call_id": call_id(self._template)}
        return [self._open(item | {"name": name, "arguments": "", "status": "in_progress"})]

    def _open(self, item: dict[str, Any]) -> Event:
        self.items.append(item)
        self._is_open = True
        told = item | {"content": []} if "content" in item else dict(item)
        return {"type": "response.output_item.added", "output_index": len(self.items) - 1, "item": told}

    def _add_text(self, text: str) -> Event:
        self.items[-1]["content"][0]["text"] += text
        return self._part_event("response.output_text.delta", delta=text, logprobs=[])

    def _close(self, status: str) -> list[Event]:
        if not self._is_open:
            return []
        self._is_open = False
        item = self.items[-1]
        item["status"] = status
        done = {"type": "response.output_item.done", "output_index": len(self.items) - 1, "item": item}
        if item["type"] == "function_call":
            name, arguments = item["name"], item["arguments"]
            return [self._event("response.function_call_arguments.done", name=name, arguments=arguments), done]
        (part,) = item["content"]
        return [
            self._part_event("response.output_text.done", text=part["text"], logprobs=[]),
            self._part_event("response.content_part.done", part=part),
            done,
        ]

    def _part_event(self, kind: str, **fields: Any) -> Event:
        return self._event(kind, content_index=0, **fields)

    def _event(self, kind: str, **fields: Any) -> Event:
        place = len(self.items) - 1
        return {"type": kind, "item_id": self.items[place]["id"], "output_index": place, **fields}
