"""/health, /ping, /version, /load and /metrics."""

from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response
from prometheus_client.exposition import choose_encoder

import loraplex
from loraplex.server.api.api_errors import ENGINE_STOPPED, RESTARTING, SHUTTING_DOWN, ApiError
from loraplex.server.api.json_route import JsonRoute, documented, json_response
from loraplex.server.state import context_of, in_thread, state_of

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


@router.head("/health", include_in_schema=False)
@router.head("/ping", include_in_schema=False)
async def health_head(http: Request) -> Response:
    """The status alone."""
    return await health(http)


@router.get("/ping", responses=documented("Ready.", required=("status",)))
async def ping(http: Request) -> Response:
    """The same as /health, under the name that SageMaker asks for."""
    return await health(http)


@router.get("/version", responses=documented("The version.", required=("version",)))
async def version(http: Request) -> Response:
    """That of loraplex."""
    return json_response({"version": loraplex.__version__})


@router.get("/load", responses=documented("The load.", 401, 403, 429, required=("server_load",)))
async def load(http: Request) -> Response:
    """How many requests are under way but this one, and which of them the engine runs or holds in its queue."""
    state = state_of(http)
    if not state.config.access.open_metrics:
        context_of(http).principal.check_manage()
    stats = state.engine.stats()
    told = {"server_load": state.num_active - 1, "running": stats.num_running, "waiting": stats.num_waiting}
    return json_response(told)


@router.get(
    "/metrics",
    responses=documented("Prometheus' text, or OpenMetrics'.", 401, 403, 429, media="text/plain"),
)
async def metrics(http: Request) -> Response:
    """For Prometheus; as OpenMetrics where the header Accept asks for that."""
    encode, media = choose_encoder(http.headers.get("accept", ""))
    text = await in_thread(http, partial(state_of(http).metrics.text, encode))
    return Response(text, headers={"content-type": media})
