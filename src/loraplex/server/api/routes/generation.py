"""/v1/completions and /v1/chat/completions."""

from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial

from fastapi import APIRouter, Request, Response

from loraplex.errors import LoraplexError
from loraplex.routing.adapter_spec import AdapterSpec
from loraplex.server.api.api_errors import as_api_error
from loraplex.server.api.chat import ChatCall
from loraplex.server.api.completions import CompletionCall
from loraplex.server.api.event_stream import EventStream
from loraplex.server.api.json_pieces import PiecesResponse, gathered, json_pieces
from loraplex.server.api.json_route import JsonRoute, documented, in_thread
from loraplex.server.api.response_parts import stream_chunks
from loraplex.server.api.schemas.generation import ChatBody, CompletionBody, GenerationBody
from loraplex.server.handlers import running, until_client_leaves
from loraplex.server.state import RequestContext, ServerState, context_of, state_of

router = APIRouter(route_class=JsonRoute)

Call = CompletionCall | ChatCall
_ERRORS = (400, 401, 404, 429)
_FIELDS = ("id", "object", "created", "model", "choices", "usage")


@router.post(
    "/v1/completions",
    responses=documented("The answers.", *_ERRORS, required=_FIELDS, media="text/event-stream"),
)
async def completions(body: CompletionBody, http: Request) -> Response:
    """Continue prompts."""
    return await _respond(body, http, lambda *given: CompletionCall(body, *given))


@router.post(
    "/v1/chat/completions",
    responses=documented("The answers.", *_ERRORS, required=_FIELDS, media="text/event-stream"),
)
async def chat_completions(body: ChatBody, http: Request) -> Response:
    """Answer the last message of a chat."""
    return await _respond(body, http, lambda *given: ChatCall(body, *given))


async def _respond(
    body: GenerationBody, http: Request, make: Callable[[ServerState, RequestContext, AdapterSpec], Call]
) -> Response:
    state, context = state_of(http), context_of(http)
    choice = state.catalog.choice(body.model, context.principal)
    try:
        call = await in_thread(http, partial(make, state, context, choice))
    except LoraplexError as error:
        raise as_api_error(error, may_see_all=context.principal.may_manage) from error
    if state.config.logs.log_prompts:
        context.log["prompts"] = call.prompts
    if body.stream:
        return await _stream(call, body, state, context)
    pieces = await until_client_leaves(http.receive, _whole(call, state, context))
    return PiecesResponse(pieces, state.config.limits.stall_timeout_s)


async def _whole(call: Call, state: ServerState, context: RequestContext) -> list[bytes]:
    async with running(state, context, call.requests, wants_deltas=False) as run:
        results = await run.results()
    return await state.workers.run(context.owner, lambda: gathered(json_pieces(call.answer(results))))


async def _stream(call: Call, body: GenerationBody, state: ServerState, context: RequestContext) -> Response:
    """What is refused is refused here, with its status; the stream begins when the engine has the requests."""
    stack = AsyncExitStack()
    run = await stack.enter_async_context(running(state, context, call.requests, wants_deltas=True))
    include_usage = body.stream_options is not None and body.stream_options.include_usage
    writing = partial(state.workers.run, context.owner)
    chunks = stream_chunks(run, call, call.extras, state.texts, include_usage=include_usage, in_thread=writing)
    return EventStream(chunks, state.config.limits.stall_timeout_s, stack.aclose)
