"""Routes that read JSON with orjson, which knows no NaN: a body's cost is bounded before it is read."""

from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from typing import Any

import orjson
from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError

from loraplex.server.api.api_errors import TOO_LARGE, UNSUPPORTED_MEDIA_TYPE, ApiError
from loraplex.server.state import in_thread, state_of

_SMALL_BODY = 2**14  # bytes that are parsed faster than a thread is asked


class _ParsedRequest(Request):
    """Whose body is what the route takes, checked: FastAPI takes an instance as it is."""

    parsed: BaseModel

    async def json(self) -> Any:
        return self.parsed


class JsonRoute(APIRoute):
    """A route whose bodies are strict JSON, parsed in a thread unless they are small."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        kind: Any = None if self.body_field is None else self.body_field.field_info.annotation

        async def with_parsed_body(request: Request) -> Response:
            if kind is None:
                return await handle(request)
            if not _is_json(request) and await request.body():
                raise _no_json(request)
            parsed = _ParsedRequest(request.scope, request.receive)
            body, state = await parsed.body(), state_of(request)
            if not body:
                return await handle(parsed)
            parse = partial(parse_body, body, kind, state.config.limits.max_body_values)
            parsed.parsed = parse() if len(body) <= _SMALL_BODY else await in_thread(parsed, parse)
            return await handle(parsed)

        return with_parsed_body


def _no_json(request: Request) -> ApiError:
    """What a client is told whose body says that it is something else."""
    given = request.headers.get("content-type")
    found = "is missing" if given is None else f"is {given[:100]!r}"
    message = f"the header content-type {found}; send the body as application/json."
    return ApiError(UNSUPPORTED_MEDIA_TYPE, message)


def _is_json(request: Request) -> bool:
    """As FastAPI decides."""
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    return media == "application/json" or (media.startswith("application/") and media.endswith("+json"))


_TEXTS = {
    400: "The request can't be served as written; `param` names the field.",
    401: "No valid API key.",
    403: "The key may not do this.",
    404: "There is no such thing, or the key may not see it.",
    408: "The body didn't arrive in time.",
    409: "In conflict with what is loaded.",
    413: "The body is too large.",
    415: "The body's content-type isn't application/json.",
    422: "The request can't be served as written.",
    429: "A limit of the key, or a full queue; Retry-After tells when to try again.",
    500: "An error of the server; the log has it under the request id.",
    503: "Shutting down, overloaded, or no room; Retry-After tells when to try again.",
}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}


# TGI's and LoRAX's.
TGI_ERROR = {
    "type": "object",
    "required": ["error", "error_type"],
    "properties": {"error": {"type": "string"}, "error_type": {"type": "string"}},
}
_EVENT = {"type": "object", "properties": {"data": {"type": "string"}}}


def documented(
    text: str,
    *statuses: int,
    required: tuple[str, ...] = (),
    media: str = "",
    error: Mapping[str, Any] = _ERROR,
) -> dict[int | str, Any]:
    """OpenAPI's `responses`: the good answer with its fields, and the errors that are possible."""
    schema: dict[str, Any] = {"type": "object", "required": list(required)} if required else {"type": "object"}
    content: dict[str, Any] = {"application/json": {"schema": schema}}
    if media:
        content |= {media: {"schema": _EVENT if media == "text/event-stream" else {"type": "string"}}}
    responses: dict[int | str, Any] = {200: {"description": text, "content": content}}
    for status in (*statuses, 408, 413, 415, 500, 503):
        responses[status] = {"description": _TEXTS[status], "content": {"application/json": {"schema": error}}}
    return responses


def json_response(content: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(content), status_code=status, media_type="application/json")


_BLOCK = 2**16  # bytes
_BEGINS_VALUE = (b"[", b"{", b",")


def parse_body(body: bytes, kind: type[BaseModel], max_values: int) -> BaseModel:
    """Raises ApiError for a body of too many values and RequestValidationError for a wrong one."""
    check_num_values(body, max_values)
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise RequestValidationError([{"type": "json_invalid", "loc": ("body", error.pos), "msg": error.msg}]) from None
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise RequestValidationError(_faults(error)) from None


def check_num_values(body: bytes, most: int) -> None:
    """Raise ApiError for a body of more than `most` JSON values: each becomes an object, which are then checked.

    A value begins at the body's start, or behind one of `[`, `{` and `,`. Those in strings don't count, but are taken
    out only where it matters.
    """
    if _num_marks(body) <= most or _num_marks_outside_strings(body, most) <= most:
        return
    message = f"the body has more than {most} JSON values (max_body_values). Send a text, or several requests."
    raise ApiError(TOO_LARGE, message)


def _num_marks_outside_strings(body: bytes, most: int) -> int:
    """In blocks, between which another thread may run, until there are more than `most`."""
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"")  # now each quote begins or ends a string
    count, inside = 0, 0
    for start in range(0, len(plain), _BLOCK):
        parts = plain[start : start + _BLOCK].split(b'"')
        count += _num_marks(b"".join(parts[inside::2]))
        inside = (inside + len(parts) - 1) % 2
        if count > most:
            break
    return count


def _num_marks(body: bytes) -> int:
    return sum(body.count(mark) for mark in _BEGINS_VALUE)


def _faults(error: ValidationError) -> list[dict[str, Any]]:
    found = error.errors(include_url=False, include_input=False, include_context=False)
    return [{**fault, "loc": ("body", *fault["loc"])} for fault in found]
