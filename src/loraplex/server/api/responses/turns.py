"""The items of a request as the turns of a chat."""

from collections.abc import Sequence
from typing import Any

from loraplex.server.api.messages import CalledFunction, Message, ToolCall, Turn, as_turns
from loraplex.server.api.responses.bodies import (
    FunctionCallItem,
    FunctionOutputItem,
    InputItem,
    MessageItem,
    ReasoningItem,
    RefusalPart,
    ResponsesBody,
    TextPart,
)


def response_turns(body: ResponsesBody) -> list[Turn]:
    """What a chat template takes: the instructions are the system's turn, with the input's own. Raises RequestError."""
    turns = as_turns(_messages(body.input))
    if not body.instructions:
        return turns
    texts = [body.instructions]
    while turns and turns[0]["role"] == "system":  # templates take one
        texts.append(turns.pop(0)["content"])
    return [{"role": "system", "content": "\n\n".join(texts)}, *turns]


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
            messages.append(_message("tool", _text(item.output), tool_call_id=item.call_id))
            continue
        fields: dict[str, Any] = {}
        if reasoning is not None and (isinstance(item, FunctionCallItem) or item.role == "assistant"):
            fields["reasoning_content"], reasoning = reasoning, None
        if isinstance(item, MessageItem):
            messages.append(_message(item.role, _text(item.content), **fields))
            continue
        call = ToolCall(id=item.call_id, function=CalledFunction(name=item.name, arguments=item.arguments))
        last = messages[-1] if messages else None
        if last is not None and last.role == "assistant" and not fields:
            messages[-1] = last.model_copy(update={"tool_calls": [*(last.tool_calls or ()), call]})
        else:
            messages.append(_message("assistant", None, tool_calls=[call], **fields))
    return messages


def _message(role: str, content: str | None, **fields: Any) -> Message:
    return Message.model_validate({"role": role, "content": content, **fields})


def _text(content: str | Sequence[TextPart | RefusalPart]) -> str:
    if isinstance(content, str):
        return content
    return "".join(part.refusal if isinstance(part, RefusalPart) else part.text for part in content)
