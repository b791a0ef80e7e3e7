"""The messages of a chat: a turn's text, the calls that an assistant made, and what tools gave."""

import json
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from loraplex.errors import RequestError
from loraplex.server.api.body import NullableBody
from loraplex.server.api.tools.definitions import MAX_TOOLS, check_depth

_MAX_PARTS = 1024  # of a message's content
_TEXT_PARTS = {"text": "text", "refusal": "refusal"}  # types of parts that are texts, and the field that has it
_IGNORED_IN_PARTS = {"cache_control"}  # of Anthropic's API, which clients of several APIs send everywhere
Turn = dict[str, Any]  # what a chat template takes


def _content(content: Any) -> Any:
    """OpenAI's content parts: all of them texts as the one text that they are, else the checked parts."""
    if not isinstance(content, list):
        return content
    if len(content) > _MAX_PARTS:
        raise ValueError(f"has {len(content)} parts; {_MAX_PARTS} are possible")
    parts = [_part(part) for part in content]
    if all(part["type"] == "text" for part in parts):
        return "".join(part["text"] for part in parts)
    return parts


def _part(part: Any) -> dict[str, str]:
    kind = str(part.get("type")) if isinstance(part, dict) else ""
    field = kind if kind == "image_url" else _TEXT_PARTS.get(kind)
    if field is None or set(part) - _IGNORED_IN_PARTS != {"type", field}:
        raise ValueError('must be a text or parts of type "text" or "image_url"; other parts are not supported')
    if kind != "image_url":
        if not isinstance(part[field], str):
            raise ValueError("a part's text must be a text")
        return {"type": "text", "text": part[field]}
    image = part["image_url"]
    if not isinstance(image, dict) or not isinstance(image.get("url"), str) or set(image) - {"url", "detail"}:
        raise ValueError('image_url must be {"url": "data:image/...;base64,..."}')
    if image.get("detail") not in (None, "auto", "high"):
        raise ValueError('detail must be "auto" or "high": images are read in the size that the model was made for')
    return {"type": "image_url", "url": image["url"]}


class CalledFunction(NullableBody):
    ignored: ClassVar = frozenset({"provider_specific_fields"})

    name: str = Field(min_length=1, max_length=256)
    arguments: str  # JSON


class ToolCall(NullableBody):
    """A call that an assistant made."""

    ignored: ClassVar = frozenset({"index", "provider_specific_fields"})  # that clients keep of answers

    id: str | None = Field(None, max_length=256)
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(NullableBody):
    """A turn of a chat."""

    ignored: ClassVar = frozenset({"provider_specific_fields"})  # that LiteLLM adds to answers
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        "function_call": ([],),
        "refusal": ([],),
        "audio": ([],),
        "annotations": ([],),
        "tool_calls": ([],),
    }

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[
        str | list[dict[str, str]] | None,
        BeforeValidator(_content, json_schema_input_type=str | list[dict[str, Any]] | None),
    ] = None
    name: str | None = Field(None, max_length=256)
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS)] | None = None
    tool_call_id: str | None = Field(None, max_length=256)
    reasoning_content: str | None = None

    @model_validator(mode="after")
    def check_role(self) -> "Message":
        """Raises ValueError for what a role can't have, or lacks."""
        if self.role == "assistant":
            if self.content is None and not self.tool_calls and self.reasoning_content is None:
                raise ValueError("an assistant's message needs content or tool_calls")
        elif self.content is None:
            raise ValueError(f"a message of role {self.role!r} needs content")
        elif self.tool_calls or self.reasoning_content is not None:
            raise ValueError("only an assistant's message has tool_calls and reasoning_content")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise ValueError('tool_call_id belongs to messages of role "tool", and they need it')
        return self


def as_turns(messages: Sequence[Message]) -> list[Turn]:
    """What a chat template takes; "developer" is OpenAI's newer word for "system". Raises RequestError.

    What a tool gave has the tool's name, which some templates need and OpenAI's API leaves to the call's id.
    """
    names: dict[str | None, str] = {}
    turns = []
    for message in messages:
        turn = _turn(message)
        if message.role == "tool" and message.name is None and message.tool_call_id in names:
            turn["name"] = names[message.tool_call_id]
        names |= {call.id: call.function.name for call in message.tool_calls or ()}
        turns.append(turn)
    return turns


def _turn(message: Message) -> Turn:
    turn: Turn = {
        "role": "system" if message.role == "developer" else message.role,
        "content": _template_content(message.content),
    }
    for field in ("name", "tool_call_id", "reasoning_content"):
        value = getattr(message, field)
        if value is not None:
            turn[field] = value
    if message.tool_calls:
        turn["tool_calls"] = [_call(call) for call in message.tool_calls]
    return turn


def _template_content(content: str | list[dict[str, str]] | None) -> str | list[dict[str, str]]:
    if not isinstance(content, list):
        return content or ""  # templates join it with texts, so None is none of their values
    return [part if part["type"] == "text" else {"type": "image"} for part in content]


def _call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.function.name, "arguments": parsed_arguments(call.function)}
    told: dict[str, Any] = {"type": "function", "function": function}
    return told if call.id is None else {"id": call.id} | told


def parsed_arguments(function: CalledFunction) -> dict[str, Any]:
    """The arguments as the object that templates write in their own way. Raises RequestError."""
    try:
        arguments = json.loads(function.arguments or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise RequestError(
            f"the arguments of a call of {function.name!r} are no JSON object. Give those that the call had, or leave "
            "the call out."
        )
    check_depth(arguments, f"the arguments of a call of {function.name!r}")
    return arguments
