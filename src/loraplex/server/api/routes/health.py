"""/health and /metrics."""

from typing import Any

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

from loraplex.server.api.api_errors import ENGINE_STOPPED, RESTARTING, SHUTTING_DOWN, ApiError
from loraplex.server.api.json_route import JsonRoute, documented, json_response
from loraplex.server.state import in_thread, state_of

router = APIRouter(route_class=JsonRoute)


@router.get("/health", responses=documented("Ready.", required=("status",)))
async def health(http: Request) -> Response:
    """Whether requests are taken; 503 while shutting down or restarting the engine, and once it has stopped.

    After faults it tells how many there were, and the kind of the last; of a watched folder, whether the last look
    failed and how many adapters could not be loaded. The log has the rest.
    """
    state = state_of(http)
    if state.is_draining:
        raise ApiError(SHUTTING_DOWN, "the server is shutting down.")
    faults = state.engine.faults
    kind = type(faults.last).__name__
    if not state.engine.is_running:
        raise ApiError(ENGINE_STOPPED, f"the engine has stopped ({faults.count} faults, the last: {kind}).")
    if state.engine.is_restarting:
        raise ApiError(RESTARTING, f"the engine starts anew after a fault ({kind}).")
    told: dict[str, Any] = {"faults": faults.count, "last_fault": kind} if faults.count else {}
    if state.watched is not None and (state.watched.fault or state.watched.errors):
        told["watch"] = {"failing": state.watched.fault is not None, "not_loaded": len(state.watched.errors)}
    return json_response({"status": "ok"} | told)


@router.get("/metrics", responses=documented("Prometheus' text.", 401, 403, 429, media="text/plain"))
async def metrics(http: Request) -> Response:
    """For Prometheus."""
    text = await in_thread(http, state_of(http).metrics.text)
    return Response(text, headers={"content-type": CONTENT_TYPE_LATEST})
