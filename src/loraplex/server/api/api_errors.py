"""Errors as HTTP answers: one table of statuses, OpenAI's shape."""

from dataclasses import dataclass
from typing import Any

from loraplex.errors import (
    AdapterChangedError,
    AdapterError,
    AdapterExistsError,
    AdapterNotFoundError,
    CapacityError,
    ConfigError,
    EngineStoppedError,
    LoraplexError,
    MixtureError,
    QueueFullError,
    RequestError,
    TooLargeError,
)

RETRY_AFTER_S = 1


@dataclass(frozen=True)
class Status:
    """An HTTP status with the `type` and `code` of its body."""

    number: int
    type: str
    code: str


ENGINE_STOPPED = Status(503, "server_error", "engine_stopped")
# The first class that an error is an instance of.
STATUSES: tuple[tuple[type[LoraplexError], Status], ...] = (
    (RequestError, Status(400, "invalid_request_error", "invalid_request")),
    (AdapterNotFoundError, Status(404, "invalid_request_error", "model_not_found")),
    (AdapterExistsError, Status(409, "invalid_request_error", "adapter_exists")),
    (AdapterChangedError, Status(409, "invalid_request_error", "adapter_changed")),
    (MixtureError, Status(409, "invalid_request_error", "mixture_conflict")),
    (AdapterError, Status(400, "invalid_request_error", "invalid_adapter")),
    (TooLargeError, Status(400, "invalid_request_error", "too_large")),
    (QueueFullError, Status(429, "rate_limit_error", "queue_full")),
    (CapacityError, Status(503, "server_error", "no_capacity")),
    (ConfigError, Status(400, "invalid_request_error", "invalid_request")),
    (EngineStoppedError, ENGINE_STOPPED),
    (LoraplexError, Status(500, "server_error", "internal_error")),
)
# What the server itself refuses.
UNAUTHORIZED = Status(401, "authentication_error", "invalid_api_key")
FORBIDDEN = Status(403, "permission_error", "not_allowed")
HOST_NOT_ALLOWED = Status(403, "permission_error", "host_not_allowed")
NOT_FOUND = Status(404, "invalid_request_error", "not_found")
METHOD_NOT_ALLOWED = Status(405, "invalid_request_error", "method_not_allowed")
BAD_REQUEST = Status(400, "invalid_request_error", "invalid_request")
UNSUPPORTED = Status(400, "invalid_request_error", "unsupported_parameter")
TOO_LARGE = Status(400, "invalid_request_error", "too_large")
UNSUPPORTED_MEDIA_TYPE = Status(415, "invalid_request_error", "unsupported_media_type")
BODY_TIMEOUT = Status(408, "invalid_request_error", "body_timeout")
HEADERS_TIMEOUT = Status(408, "invalid_request_error", "headers_timeout")
HEADERS_TOO_LARGE = Status(431, "invalid_request_error", "headers_too_large")
BODY_TOO_LARGE = Status(413, "invalid_request_error", "body_too_large")
TOO_MANY_CONNECTIONS = Status(429, "rate_limit_error", "too_many_connections")
RATE_LIMITED = Status(429, "rate_limit_error", "rate_limit_exceeded")
INTERNAL = Status(500, "server_error", "internal_error")
RESTARTING = Status(503, "server_error", "engine_restarting")
SHUTTING_DOWN = Status(503, "server_error", "shutting_down")
OVERLOADED = Status(503, "server_error", "overloaded")
_RETRY = (RATE_LIMITED, TOO_MANY_CONNECTIONS, SHUTTING_DOWN, OVERLOADED, ENGINE_STOPPED, RESTARTING)


_TGI_PATHS = ("/generate", "/generate_stream", "/")
_TGI_STATUSES = {400: 422, 415: 422}
_TGI_KINDS = {429: "overloaded", 503: "overloaded", 500: "generation"}


class ApiError(Exception):
    """A refusal with its HTTP status; `param` is the field at fault."""

    def __init__(
        self,
        status: Status,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: float = 0,
        quotes_request: bool = False,  # the message may hold what a prompt says, which no log does
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.log_message = "(it quotes the request)" if quotes_request else message
        self.param = param
        retries = status in _RETRY or status.code in ("queue_full", "no_capacity")
        self.retry_after_s = retry_after_s or (RETRY_AFTER_S if retries else 0)

    def body(self) -> dict[str, Any]:
        return {
            "error": {
                "message": self.message,
                "type": self.status.type,
                "param": self.param,
                "code": self.status.code,
            }
        }

    def told(self, path: str) -> tuple[int, dict[str, Any]]:
        """Status and body as clients of a path expect them: OpenAI's, or TGI's and LoRAX's."""
        number = self.status.number
        if path not in _TGI_PATHS:
            return number, self.body()
        kind = _TGI_KINDS.get(number, "validation")
        return _TGI_STATUSES.get(number, number), {
            "error": self.message,
            "error_type": kind,
            "code": self.status.code,
            "param": self.param,
        }

    def headers(self) -> dict[str, str]:
        headers = {"retry-after": str(max(1, round(self.retry_after_s)))} if self.retry_after_s else {}
        if self.status is UNAUTHORIZED:
            headers["www-authenticate"] = "Bearer"
        return headers


def as_api_error(error: LoraplexError, *, may_see_all: bool) -> ApiError:
    """An engine's error for a client. What would tell the names of other tenants' adapters is said without them."""
    status = next(status for kind, status in STATUSES if isinstance(error, kind))
    if may_see_all or isinstance(error, TooLargeError) or not isinstance(error, _NAMING):
        return ApiError(status, str(error), quotes_request=isinstance(error, RequestError))
    return ApiError(status, _IMPERSONAL.get(status.code, "This can't be done with what is loaded now."))


_NAMING = (AdapterNotFoundError, AdapterExistsError, MixtureError, CapacityError)  # their messages list what is loaded
_IMPERSONAL = {
    "model_not_found": "An adapter that the request needs is no longer loaded.",
    "adapter_exists": "This name is in use. Choose another one, or replace it.",
    "mixture_conflict": "A mixture that is loaded, or that would be, doesn't allow this.",
    "queue_full": "Too many requests are waiting. Try again later.",
    "no_capacity": "There is no room for the request's adapters now. Try again later.",
}
