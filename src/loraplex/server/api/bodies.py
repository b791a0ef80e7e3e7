"""From a body's bytes to what a route takes: strict JSON, whose cost is bounded before it is read."""

from typing import Any

import orjson
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError

from loraplex.server.api.api_errors import TOO_LARGE, ApiError

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
