"""/health and /metrics."""

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

from loraplex.server.api_errors import OVERLOADED, SHUTTING_DOWN, ApiError
from loraplex.server.json_route import JsonRoute, documented, json_response
from loraplex.server.state import state_of

router = APIRouter(route_class=JsonRoute)


@router.get("/health", responses=documented("Ready.", required=("status",)))
async def health(http: Request) -> Response:
    """Whether requests are taken; 503 while shutting down, or if the engine's thread has ended."""
    state = state_of(http)
    if state.is_draining:
        raise ApiError(SHUTTING_DOWN, "the server is shutting down.")
    if not state.engine.is_running:
        raise ApiError(OVERLOADED, "the engine has stopped.")
    return json_response({"status": "ok"})


@router.get("/metrics", responses=documented("Prometheus' text.", 401, 403, 429, media="text/plain"))
async def metrics(http: Request) -> Response:
    """For Prometheus."""
    return Response(state_of(http).metrics.text(), headers={"content-type": CONTENT_TYPE_LATEST})
