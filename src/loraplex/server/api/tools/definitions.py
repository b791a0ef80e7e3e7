"""The tools that a request offers, and which of them an answer may or must call."""

import json
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from loraplex.errors import RequestError
from loraplex.server.api.api_errors import BAD_REQUEST, ApiError
from loraplex.server.api.body import Body, NullableBody, one_of

MAX_TOOLS = 128  # as OpenAI's
MAX_TOOLS_BYTES = 2**17  # of all tools' JSON
MAX_DEPTH = 32  # objects and lists in one another, of parameters and of arguments
FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class FunctionDefinition(NullableBody):
    """A function: its name, what it does, and the JSON schema of its arguments, an object."""

    name: FunctionName
    description: str | None = Field(None, max_length=2**16)
    parameters: dict[str, Any] | None = None
    strict: bool | None = None  # calls of it fit its schema, with tool_choice "auto" too


class Tool(NullableBody):
    """OpenAI's only kind of tool that a client runs: a function."""

    ignored: ClassVar = frozenset({"cache_control"})

    type: Literal["function"]
    function: FunctionDefinition


class FunctionChoice(Body):
    name: FunctionName


class NamedToolChoice(Body):
    """The one function that an answer must call."""

    type: Literal["function"]
    function: FunctionChoice


ToolList = Annotated[list[Tool], Field(max_length=MAX_TOOLS)]
ToolChoice = one_of(
    Literal["none", "auto", "required"] | NamedToolChoice | None,
    '"none", "auto", "required" or {"type": "function", "function": {"name": ...}}',
)


def checked_functions(functions: Sequence[FunctionDefinition]) -> list[FunctionDefinition]:
    """Functions whose names differ, whose parameters describe objects, and that are not too large to look at.

    Raises ApiError that names the field.
    """
    size = 0
    names: set[str] = set()
    for place, function in enumerate(functions):
        if function.name in names:
            raise _refusal(place, f"another tool has the name {function.name!r} too. Names must differ.")
        names.add(function.name)
        parameters = function.parameters or {}
        if parameters.get("type", "object") != "object":
            raise _refusal(place, f"the parameters of {function.name!r} must be a schema of type object.")
        try:
            check_depth(parameters, f"the parameters of {function.name!r}")
        except RequestError as error:
            raise _refusal(place, str(error)) from None
        size += len(json.dumps(parameters)) + len(function.description or "")
        if size > MAX_TOOLS_BYTES:
            raise _refusal(place, f"the tools have more than {MAX_TOOLS_BYTES} characters. Give fewer or smaller ones.")
    return list(functions)


def check_depth(value: Any, what: str) -> None:
    """Raise RequestError for objects and lists that are nested too deep for templates and grammars."""
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [inner for outer in level if isinstance(outer, dict | list) for inner in _values(outer)]
        if not level:
            return
    raise RequestError(f"{what} are nested more than {MAX_DEPTH} deep. Give flatter ones.")


def _values(container: Any) -> list[Any]:
    return list(container.values()) if isinstance(container, dict) else list(container)


def template_tool(function: FunctionDefinition) -> dict[str, Any]:
    """A function as chat templates take it, which is as OpenAI's API has it."""
    told: dict[str, Any] = {"name": function.name, "description": function.description or ""}
    told["parameters"] = function.parameters or {"type": "object", "properties": {}}
    return {"type": "function", "function": told}


def _refusal(place: int, message: str) -> ApiError:
    return ApiError(BAD_REQUEST, f"tools.{place}: {message}", param=f"tools.{place}", quotes_request=True)
