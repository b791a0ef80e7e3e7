"""The items of a request as the messages of a chat."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter

from loraplex.server.api.api_errors import BAD_REQUEST, ApiError
from loraplex.server.api.messages import CalledFunction, Message, ToolCall
from loraplex.server.api.responses.bodies import (
    FunctionCallItem,
    FunctionOutputItem,
    ImagePart,
    InputItem,
    ItemReference,
    MessageItem,
    Part,
    ReasoningItem,
    RefusalPart,
    ResponsesBody,
    WholeItem,
)

_ITEM: TypeAdapter[Any] = TypeAdapter(InputItem)
Find = Callable[[str], Mapping[str, Any] | None]  # an item of an earlier answer by its id


def response_messages(body: ResponsesBody, find: Find) -> list[Message]:
    """The instructions are the system's turn, with the input's own. Raises ApiError for references to nothing."""
    messages = _messages([_found(item, place, find) for place, item in enumerate(body.input)])
    if not body.instructions:
        return messages
    texts = [body.instructions]
    while messages and messages[0].role in ("system", "developer"):  # templates take one
        content = messages[0].content
        if not isinstance(content, str):
            break
        texts.append(content)
        messages.pop(0)
    return [_message("system", "\n\n".join(texts)), *messages]


def _messages(items: Sequence[WholeItem]) -> list[Message]:
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


def _found(item: InputItem, place: int, find: Find) -> WholeItem:
    """The item that a reference stands for."""
    if not isinstance(item, ItemReference):
        return item
    known = find(item.id)
    if known is None:
        raise ApiError(
            BAD_REQUEST,
            f"input.{place}: no item {item.id!r} is known here, or not any more: responses are not kept. Send the item "
            "itself.",
            param=f"input.{place}",
        )
    found: WholeItem = _ITEM.validate_python(known)
    return found


def _message(role: str, content: str | list[dict[str, Any]] | None, **fields: Any) -> Message:
    return Message.model_validate({"role": role, "content": content, **fields})


def _content(content: str | Sequence[Part]) -> str | list[dict[str, Any]]:
    return content if isinstance(content, str) else [_chat_part(part) for part in content]


def _chat_part(part: Part) -> dict[str, Any]:
    if isinstance(part, ImagePart):
        return part.as_chat_part()
    return {"type": "text", "text": part.refusal if isinstance(part, RefusalPart) else part.text}
