"""Routes that read JSON with orjson, which knows no NaN, and whose OpenAPI tells the errors."""

from collections.abc import Callable, Coroutine
from typing import Any

import orjson
from fastapi import Request, Response
from fastapi.routing import APIRoute


class _JsonRequest(Request):
    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            self._json = orjson.loads(await self.body())
        return self._json


class JsonRoute(APIRoute):
    """A route whose bodies are strict JSON."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def with_orjson(request: Request) -> Response:
            return await handle(_JsonRequest(request.scope, request.receive))

        return with_orjson


_TEXTS = {
    400: "The request can't be served as written; `param` names the field.",
    401: "No valid API key.",
    403: "The key may not do this.",
    404: "There is no such thing, or the key may not see it.",
    408: "The body didn't arrive in time.",
    409: "In conflict with what is loaded.",
    413: "The body is too large.",
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


def documented(text: str, *statuses: int, required: tuple[str, ...] = (), media: str = "") -> dict[int | str, Any]:
    """OpenAPI's `responses`: the good answer with its fields, and the errors that are possible."""
    schema: dict[str, Any] = {"type": "object", "required": list(required)} if required else {"type": "object"}
    content: dict[str, Any] = {"application/json": {"schema": schema}}
    if media:
        content |= {media: {"schema": {"type": "string"}}}
    responses: dict[int | str, Any] = {200: {"description": text, "content": content}}
    for status in (*statuses, 408, 413, 500, 503):
        responses[status] = {"description": _TEXTS[status], "content": {"application/json": {"schema": _ERROR}}}
    return responses


def json_response(content: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(content), status_code=status, media_type="application/json")
