"""/v1/responses, without state: each request brings all its items."""

from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from functools import partial

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from starlette.responses import Response

from loraplex.engine.request import RequestResult
from loraplex.errors import LoraplexError
from loraplex.server.api.api_errors import ApiError
from loraplex.server.api.json_route import JsonRoute, documented
from loraplex.server.api.response_parts import News
from loraplex.server.api.responses.bodies import ResponsesBody
from loraplex.server.api.responses.call import ResponsesCall
from loraplex.server.api.streaming import CHANNEL_KEY, BodyChannel, EventStream, PiecesResponse, gathered, json_pieces
from loraplex.server.handlers import Run, running
from loraplex.server.state import RequestContext, ServerState, context_of, in_thread, state_of, until_client_leaves

router = APIRouter(route_class=JsonRoute)
_FIELDS = ("id", "object", "created_at", "status", "model", "output")
_ANSWERS = documented("The response.", 400, 401, 404, 429, required=_FIELDS, media="text/event-stream")


@router.post("/v1/responses", responses=_ANSWERS)
async def responses(body: ResponsesBody, http: HttpRequest) -> Response:
    """Answer items: texts, calls of functions and what they gave."""
    state, context = state_of(http), context_of(http)
    adapters = state.catalog.choice(body.model, context.principal)
    try:
        call = await in_thread(http, partial(ResponsesCall, body, state, context, adapters))
    except LoraplexError as error:
        raise context.refusal(error) from error
    context.response = {"id": call.id}
    if state.config.logs.log_prompts:
        context.log["prompts"] = [call.turns]
    stall_timeout_s = state.config.limits.stall_timeout_s
    if body.stream:
        stack = AsyncExitStack()
        run = await stack.enter_async_context(running(state, context, [call.request], wants_deltas=True))
        events = _events(run, call, context, http.scope.get(CHANNEL_KEY))
        return EventStream(events, stall_timeout_s, stack.aclose, done=b"")
    pieces = await until_client_leaves(http.receive, _whole(call, state, context))
    return PiecesResponse(pieces, stall_timeout_s)


async def _whole(call: ResponsesCall, state: ServerState, context: RequestContext) -> list[bytes]:
    async with running(state, context, [call.request], wants_deltas=False) as run:
        (result,) = await run.results()
    return await state.workers.run(context.owner, lambda: gathered(json_pieces(call.answer(result))))


async def _events(
    run: Run, call: ResponsesCall, context: RequestContext, channel: BodyChannel | None
) -> AsyncGenerator[bytes, None]:
    def told(news: News) -> bytes:
        return b"".join(call.add(news.text))

    for event in call.begin():
        yield event
    try:
        async for events in run.batches(run.writer(channel, told)):
            found, failure = run.gather(events, holds_end=False)
            for news in found:
                yield told(news)
            if failure is not None:  # what came before it has been told
                raise failure
            for result in events:
                if isinstance(result, RequestResult):
                    for event in call.end(result):
                        yield event
    except ApiError as error:
        context.note(error)
        for event in call.fail(error):
            yield event
