"""/generate, /generate_stream and /info, as LoRAX's and TGI's clients call them, with their shapes."""

from contextlib import AsyncExitStack
from functools import partial

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from starlette.responses import Response

import loraplex
from loraplex.errors import LoraplexError
from loraplex.server.api.engine_requests import allowed_tokens
from loraplex.server.api.json_route import TGI_ERROR, JsonRoute, documented, json_response
from loraplex.server.api.streaming import CHANNEL_KEY, EventStream, PiecesResponse, gathered, json_pieces
from loraplex.server.api.tgi.bodies import GenerateBody, GenerateParameters, check_parameters, model_of
from loraplex.server.api.tgi.call import GenerateCall
from loraplex.server.handlers import running
from loraplex.server.state import RequestContext, ServerState, context_of, in_thread, state_of, until_client_leaves

router = APIRouter(route_class=JsonRoute)


_GENERATED = documented(
    "The answer.",
    *(401, 404, 422, 429),
    required=("generated_text",),
    media="text/event-stream",
    error=TGI_ERROR,
)


@router.post("/", responses=_GENERATED, include_in_schema=False)
async def generate_at_root(body: GenerateBody, http: HttpRequest) -> Response:
    """Where both servers' clients send to, which get a list of one answer there."""
    return await _answer(body, http, stream=bool(body.stream), as_list=True)


@router.post("/generate", responses=_GENERATED)
async def generate(body: GenerateBody, http: HttpRequest) -> Response:
    """Continue a text, as LoRAX and TGI do; with `stream` as /generate_stream."""
    return await _answer(body, http, stream=bool(body.stream))


@router.post("/generate_stream", responses=_GENERATED)
async def generate_stream(body: GenerateBody, http: HttpRequest) -> Response:
    """The same, one event for each token."""
    return await _answer(body, http, stream=True)


@router.get("/info", responses=documented("The model.", 401, 429, required=("model_id", "max_total_tokens")))
async def info(http: HttpRequest) -> Response:
    """What TGI and LoRAX tell of their model and limits."""
    state = state_of(http)
    config, base = state.config, state.model.base
    engine = state.engine
    told = {
        "model_id": config.model.model,
        "model_sha": None,
        "model_dtype": f"torch.{str(base.dtype).removeprefix('torch.')}",
        "model_device_type": base.device.type,
        "model_pipeline_tag": "text-generation",
        "max_concurrent_requests": config.network.max_connections,
        "max_best_of": config.limits.max_choices,
        "max_stop_sequences": 16,
        "max_input_length": engine.max_length - 1,
        "max_input_tokens": engine.max_length - 1,
        "max_total_tokens": engine.max_length,
        "max_new_tokens": allowed_tokens(context_of(http).principal, config.limits),
        "max_batch_size": config.engine.max_running,
        "validation_workers": 4,
        "router": "loraplex",
        "version": loraplex.__version__,
        "sha": None,
        "docker_label": None,
    }
    return json_response(told)


async def _answer(body: GenerateBody, http: HttpRequest, *, stream: bool, as_list: bool = False) -> Response:
    state, context = state_of(http), context_of(http)
    parameters = body.parameters or GenerateParameters.model_validate({})
    check_parameters(parameters, stream=stream)
    choice = state.catalog.choice(model_of(parameters, state.catalog.base_name), context.principal)
    try:
        call = await in_thread(http, partial(GenerateCall, body, parameters, state, context, choice, stream=stream))
    except LoraplexError as error:
        raise context.refusal(error) from error
    if state.config.logs.log_prompts:
        context.log["prompts"] = [body.inputs]
    if stream:
        stack = AsyncExitStack()
        run = await stack.enter_async_context(running(state, context, call.requests, wants_deltas=True))
        limit_s = state.config.limits.stall_timeout_s
        events = call.events(run, http.scope.get(CHANNEL_KEY))
        return EventStream(events, limit_s, stack.aclose, done=b"", path="/generate_stream")
    pieces = await until_client_leaves(http.receive, _whole(call, state, context, as_list=as_list))
    return PiecesResponse(pieces, state.config.limits.stall_timeout_s)


async def _whole(call: GenerateCall, state: ServerState, context: RequestContext, *, as_list: bool) -> list[bytes]:
    async with running(state, context, call.requests, wants_deltas=False) as run:
        (result,) = await run.results()

    def write() -> list[bytes]:
        answer = call.answer(result)
        return gathered(json_pieces([answer] if as_list else answer))

    return await state.workers.run(context.owner, write)
