"""The application: routes, the gate before them, and errors in OpenAI's shape."""

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

import loraplex
from loraplex.errors import LoraplexError
from loraplex.server.api.api_errors import (
    BAD_REQUEST,
    INTERNAL,
    METHOD_NOT_ALLOWED,
    NOT_FOUND,
    UNSUPPORTED,
    ApiError,
    Status,
)
from loraplex.server.api.json_route import json_response
from loraplex.server.api.refused_fields import refusal_of
from loraplex.server.api.routes import (
    adapters,
    chat,
    completions,
    docs_page,
    embeddings,
    generate,
    health,
    models,
    page,
    responses,
    tokens,
    vllm,
)
from loraplex.server.middleware import Gate
from loraplex.server.state import ClientLeft, ServerState, context_of

_ROUTERS = (
    models.router,
    completions.router,
    chat.router,
    responses.router,
    adapters.router,
    vllm.router,
    tokens.router,
    health.router,
    page.router,
    embeddings.router,
    generate.router,
    docs_page.router,
)
_MAX_FAULTS = 5
_FASTAPIS = "Validation Error"  # what it describes the 422 with that it would send


def create_app(state: ServerState, *, is_first: bool = True) -> ASGIApp:
    """The ASGI application of one server, or of a replica behind a front, which was asked first."""
    app = FastAPI(title="loraplex", version=loraplex.__version__, docs_url=None, redoc_url=None)
    app.state.server = state
    for router in _ROUTERS:
        app.include_router(router)
    if state.training is not None:
        from loraplex.server.tinker.routes import (
            sampling,
            sessions,
            training,
            training_runs,
        )  # which need the extra "tinker"

        for module in (sessions, training, sampling, training_runs):
            app.include_router(module.router)
    for kind in (ApiError, LoraplexError, RequestValidationError, HTTPException, ClientLeft, Exception):
        app.add_exception_handler(kind, _on_error)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return with_cors(Gate(app, state, is_first=is_first), state.config.network.cors_origins)


def with_cors(app: ASGIApp, origins: Sequence[str]) -> ASGIApp:
    """Let pages of these origins call the application and read its answers, refusals too."""
    if not origins:
        return app
    return CORSMiddleware(
        app,
        allow_origins=origins,
        allow_methods=["*"],
        allow_headers=["*"],
        expose_headers=["x-request-id", "retry-after"],
    )


async def _on_error(http: Request, error: Exception) -> Response:
    context, headers = context_of(http), {}
    if isinstance(error, ClientLeft):
        context.log["ended"] = "disconnected"
        return Response(status_code=499)  # nobody reads it
    if isinstance(error, HTTPException):
        headers = dict(error.headers or {})
    told = _as_api_error(http, error)
    context.note(told)
    number, body = told.told(http.url.path)
    response = json_response(body, number)
    response.headers.update(told.headers() | headers)
    return response


def _as_api_error(http: Request, error: Exception) -> ApiError:
    match error:
        case ApiError():
            return error
        case LoraplexError():
            return context_of(http).refusal(error)
        case RequestValidationError():
            return _invalid(error.errors())
        case HTTPException():
            kinds = {404: NOT_FOUND, 405: METHOD_NOT_ALLOWED}
            status = kinds.get(error.status_code, Status(error.status_code, "invalid_request_error", "http_error"))
            return ApiError(status, f"{http.method} {http.url.path[:200]}: {error.detail}.")
    # What nobody expected; the gate logs it.
    return ApiError(INTERNAL, f"internal error; the log has it under {context_of(http).id}.")


def _invalid(faults: Sequence[Any]) -> ApiError:
    """Names every field at fault, never the values."""
    told, params, unsupported = [], [], False
    for fault in faults[:_MAX_FAULTS]:
        place = [str(part)[:100] for part in fault["loc"][1:]]
        param = ".".join(place)
        params.append(param)
        if fault["type"] == "extra_forbidden":
            unsupported = True
            told.append(f"{param!r} {refusal_of(place[-1])}")
        elif fault["type"] == "json_invalid":
            params[-1] = ""
            told.append("the body is no valid JSON")
        else:
            told.append(f"{param or 'the body'}: {fault['msg']}")
    message = "; ".join(told) + (f"; and {len(faults) - _MAX_FAULTS} more" if len(faults) > _MAX_FAULTS else "")
    return ApiError(UNSUPPORTED if unsupported else BAD_REQUEST, f"{message}.", param=params[0] or None)


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's description, without the 422 that this server doesn't send."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
        for path in schema["paths"].values():
            for operation in path.values():
                if operation["responses"].get("422", {}).get("description") == _FASTAPIS:
                    del operation["responses"]["422"]
        if app.state.server.keys is not None:
            schema.setdefault("components", {})["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            schema["security"] = [{"key": []}]
        app.openapi_schema = schema
    return app.openapi_schema
