"""Sessions, what the server offers, and how its clients are to speak to it."""

from fastapi import APIRouter, Request, Response

from loraplex.server.api.api_errors import ApiError
from loraplex.server.api.json_route import JsonRoute, documented, json_response
from loraplex.server.tinker.bodies import ClientConfig, CreateSession, FinishSession, SessionHeartbeat
from loraplex.server.tinker.routes.common import TinkerCall
from loraplex.server.tinker.service import GONE

router = APIRouter(route_class=JsonRoute, prefix="/api/v1")
_MAX_CHUNK = 5_000_000  # bytes of data in one forward_backward, of which the SDK makes several if need be
_BODY_SHARE = 0.75  # of a body: the SDK counts the tensors alone
_MIN_TOKEN_BYTES = 12  # as the SDK counts them: a token and its target
_MAX_LISTED = 200


@router.get("/healthz", responses=documented("The server runs.", required=("status",)))
async def healthz() -> Response:
    """Whether the server runs."""
    return json_response({"status": "ok"})


@router.post("/client/config", responses=documented("How to speak to this server.", 401))
async def client_config(body: ClientConfig, http: Request) -> Response:
    """How the SDK is to send its requests."""
    call = TinkerCall(http)
    of_body = int(_BODY_SHARE * call.state.config.limits.max_body_bytes)
    of_tokens = _MIN_TOKEN_BYTES * call.service.loop.limits.max_request_tokens
    return json_response(
        {
            "pjwt_auth_enabled": False,
            "credential_default_source": "api_key",
            "parallel_fwdbwd_chunks": True,
            "proto_compress_fwdbwd": False,
            "fwdbwd_max_chunk_bytes_count": min(_MAX_CHUNK, of_body, of_tokens),
            "sample_use_retrieve_futures": False,
            "custom_loss_server_side": False,
            "sample_join_sampling_session": True,
        }
    )


@router.post("/client/dynamic_config", responses=documented("What may change.", 401))
async def client_dynamic_config(body: ClientConfig) -> Response:
    """The same, asked for again and again."""
    return json_response({"sample_cancel_enabled": True})


@router.get("/get_server_capabilities", responses=documented("The base model.", 401, required=("supported_models",)))
async def capabilities(http: Request) -> Response:
    """The models that can be trained: the server's one."""
    service = TinkerCall(http).service
    model = {
        "model_name": service.base_name,
        "max_context_length": service.max_length,
        "trainable": True,
        "sampleable": True,
    }
    return json_response({"supported_models": [model]})


@router.post("/create_session", responses=documented("The session.", 400, 401, 429, required=("session_id",)))
async def create_session(body: CreateSession, http: Request) -> Response:
    """Begin: what a client makes belongs to its session and its key."""
    call = TinkerCall(http)
    session = await call.in_thread(
        lambda: call.service.sessions.create(
            call.principal.id,
            display_name=body.display_name,
            user_metadata=body.user_metadata or {},
            tags=tuple(body.tags),
        )
    )
    return json_response({"type": "create_session", "session_id": session.id})


@router.post("/session_heartbeat", responses=documented("Heard.", 401, 404))
async def session_heartbeat(body: SessionHeartbeat, http: Request) -> Response:
    """A client is still there."""
    call = TinkerCall(http)
    session = call.service.session(body.session_id, call.principal)
    if session.finished is not None:
        raise ApiError(GONE, "the session has finished.")
    return json_response({"type": "session_heartbeat"})


@router.post("/sessions/{session_id}/finish", responses=documented("Finished.", 400, 401, 404))
async def finish_session(session_id: str, body: FinishSession, http: Request) -> Response:
    """A client says that it is done: its runs leave memory, its checkpoints stay."""
    call = TinkerCall(http)
    session = call.service.session(session_id, call.principal)

    def finish() -> None:
        call.service.sessions.finish(session, body.reason.type)
        call.service.loop.release(session.runs)

    await call.in_thread(finish)
    return json_response({})


@router.get("/sessions", responses=documented("The key's sessions.", 401, required=("sessions",)))
async def list_sessions(http: Request, limit: int = 20, offset: int = 0) -> Response:
    """Sessions, newest first."""
    call = TinkerCall(http)
    owner = None if call.principal.may_manage else call.principal.id
    found = await call.in_thread(lambda: [session.id for session in call.service.sessions.all_of(owner)])
    return json_response({"sessions": found[max(0, offset) :][: min(max(0, limit), _MAX_LISTED)]})


@router.get("/sessions/{session_id}", responses=documented("The session.", 401, 404, required=("training_run_ids",)))
async def get_session(session_id: str, http: Request) -> Response:
    """A session's training runs and sampling clients."""
    call = TinkerCall(http)
    session = call.service.session(session_id, call.principal)
    metadata = {name: str(value) for name, value in session.user_metadata.items()}
    return json_response(
        {
            "training_run_ids": session.runs,
            "sampler_ids": list(session.samplers),
            "user_metadata": metadata or None,
            "display_name": session.display_name,
        }
    )


@router.post("/telemetry", responses=documented("Taken, and not kept.", 401, required=("status",)))
async def telemetry() -> Response:
    """What the SDK tells about itself; nothing of it is read or kept."""
    return json_response({"status": "accepted"})
