"""The items of a request as the messages of a chat."""

from collections.abc import Sequence
from typing import Any

from loraplex.server.api.messages import CalledFunction, Message, ToolCall
from loraplex.server.api.responses.bodies import (
    FunctionCallItem,
    FunctionOutputItem,
    ImagePart,
    InputItem,
    MessageItem,
    Part,
    ReasoningItem,
    RefusalPart,
    ResponsesBody,
)


def response_messages(body: ResponsesBody) -> list[Message]:
    """The instructions are the system's turn, with the input's own."""
    messages = _messages(body.input)
    if not body.instructions:
        return messages
    texts = [body.instructions]
    while messages and messages[0].role in ("system", "developer") and isinstance(messages[0].content, str):
        texts.append(messages.pop(0).content)  # templates take one
    return [_message("system", "\n\n".join(texts)), *messages]


def _messages(items: Sequence[InputItem]) -> list[Message]:
    """Calls belong to the assistant's turn before them, reasoning to the one behind it."""
    messages: list[Message] = []
    reasoning: str | None = None
    for item in items:
        if isinstance(item, ReasoningItem):
            texts = "\n".join(part.text for part in item.content or item.summary)
            reasoning = "\n".join(filter(None, [reasoning, texts])) or None
            continue
        if isinstance(item, FunctionOutputItem):
            messages.append(_message("tool", _content(item.output), tool_call_id=item.call_id))
            continue
        fields: dict[str, Any] = {}
        if reasoning is not None and (isinstance(item, FunctionCallItem) or item.role == "assistant"):
            fields["reasoning_content"], reasoning = reasoning, None
        if isinstance(item, MessageItem):
            messages.append(_message(item.role, _content(item.content), **fields))
            continue
        call = ToolCall(id=item.call_id, function=CalledFunction(name=item.name, arguments=item.arguments))
        last = messages[-1] if messages else None
        if last is not None and last.role == "assistant" and not fields:
            messages[-1] = last.model_copy(update={"tool_calls": [*(last.tool_calls or ()), call]})
        else:
            messages.append(_message("assistant", None, tool_calls=[call], **fields))
    return messages


def _message(role: str, content: str | list[dict[str, Any]] | None, **fields: Any) -> Message:
    return Message.model_validate({"role": role, "content": content, **fields})


def _content(content: str | Sequence[Part]) -> str | list[dict[str, Any]]:
    return content if isinstance(content, str) else [_chat_part(part) for part in content]


def _chat_part(part: Part) -> dict[str, Any]:
    if isinstance(part, ImagePart):
        return part.as_chat_part()
    return {"type": "text", "text": part.refusal if isinstance(part, RefusalPart) else part.text}
