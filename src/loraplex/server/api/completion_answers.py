"""Answers of OpenAI's APIs of chats and completions: whole, or as streams of chunks."""

from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import Any, Protocol

import orjson
from fastapi import Request as HttpRequest
from starlette.responses import Response

from loraplex.engine.request import Request, RequestResult
from loraplex.errors import LoraplexError
from loraplex.routing.adapter_spec import AdapterSpec
from loraplex.server.api.bodies import GenerationBody, StreamOptions
from loraplex.server.api.json_route import documented
from loraplex.server.api.response_parts import Extras, News, auto_json, chosen_model, chunk_usage, obfuscation, usage
from loraplex.server.api.streaming import (
    CHANNEL_KEY,
    BodyChannel,
    EventStream,
    PiecesResponse,
    gathered,
    json_pieces,
    sse,
    sse_pieces,
)
from loraplex.server.handlers import Run, running
from loraplex.server.state import (
    RequestContext,
    RowTokenizer,
    ServerState,
    context_of,
    in_thread,
    state_of,
    until_client_leaves,
)

_FIELDS = ("id", "object", "created", "model", "choices", "usage")
ANSWERS = documented("The answers.", 400, 401, 404, 429, required=_FIELDS, media="text/event-stream")


class ApiCall(Protocol):
    """One call of one of OpenAI's APIs: what it asks the engine, and how it writes what comes back."""

    prompts: list[Any]
    n: int
    extras: Extras
    row_tokenizer: RowTokenizer
    requests: list[Request]
    envelope: dict[str, Any]

    def answer(self, results: Sequence[RequestResult]) -> dict[str, Any]: ...

    def chunk_choice(self, news: News) -> dict[str, Any]: ...

    def chunk_fields(self, news: News) -> dict[str, Any]:
        """Fields beside the choices."""
        ...


async def respond(
    body: GenerationBody, http: HttpRequest, make: Callable[[ServerState, RequestContext, AdapterSpec], ApiCall]
) -> Response:
    """The answer to a body, whose call is made in a thread."""
    state, context = state_of(http), context_of(http)
    choice = state.catalog.choice(body.model, context.principal)
    try:
        call = await in_thread(http, partial(make, state, context, choice))
    except LoraplexError as error:
        raise context.refusal(error) from error
    context.response = {"id": call.envelope["id"]}
    if state.config.logs.log_prompts:
        context.log["prompts"] = call.prompts
    if body.stream:
        return await _stream(call, body, state, context, http.scope.get(CHANNEL_KEY))
    pieces = await until_client_leaves(http.receive, _whole(call, state, context))
    return PiecesResponse(pieces, state.config.limits.stall_timeout_s)


async def _whole(call: ApiCall, state: ServerState, context: RequestContext) -> list[bytes]:
    async with running(state, context, call.requests, wants_deltas=False) as run:
        results = await run.results()
    return await state.workers.run(context.owner, lambda: gathered(json_pieces(call.answer(results))))


async def _stream(
    call: ApiCall, body: GenerationBody, state: ServerState, context: RequestContext, channel: BodyChannel | None
) -> Response:
    """What is refused is refused here, with its status; the stream begins when the engine has the requests."""
    stack = AsyncExitStack()
    run = await stack.enter_async_context(running(state, context, call.requests, wants_deltas=True))
    chunks = Chunks(call, body.stream_options or StreamOptions(), state.catalog.base_name)
    parts = _parts(run, chunks, state, context, channel)
    return EventStream(parts, state.config.limits.stall_timeout_s, stack.aclose)


async def _parts(
    run: Run, chunks: "Chunks", state: ServerState, context: RequestContext, channel: BodyChannel | None
) -> AsyncGenerator[bytes, None]:
    """The answer's chunks: for each answer that has news one, then what extensions add, then the usage."""
    results: list[RequestResult] = []
    async for events in run.batches(run.writer(channel, chunks.small)):
        found, failure = run.gather(events, holds_end=chunks.holds_end)
        for news in found:
            write = partial(chunks.pieces, news)
            for piece in await state.workers.run(context.owner, write) if news.is_large else write():
                yield piece
        if failure is not None:  # what came before it has been told
            raise failure
        results += [event for event in events if isinstance(event, RequestResult)]
    for piece in chunks.usage(results):
        yield piece


class Chunks:
    """Writes one stream's chunks."""

    def __init__(self, call: ApiCall, options: StreamOptions, base_name: str) -> None:
        self._call = call
        self._base_name = base_name
        self._counts_each = bool(options.include_usage and options.continuous_usage_stats)
        self._obfuscates = bool(options.include_obfuscation)
        self._num_told: Counter[tuple[int, int]] = Counter()  # tokens of each answer
        self._common: dict[str, Any] = {"usage": None} if options.include_usage else {}
        self._begin = b"data: " + orjson.dumps(call.envelope)[:-1] + b',"choices":['  # of most chunks
        self._end = (b'],"usage":null}' if options.include_usage else b"]}") + b"\n\n"

    @property
    def holds_end(self) -> bool:
        """Whether an answer's finish_reason comes with what extensions add."""
        return self._call.extras.any

    def small(self, news: News) -> bytes:
        """The chunk of news that aren't the end of an answer."""
        choice = self._call.chunk_choice(news)
        if news.auto is not None:
            choice |= auto_json(news.auto, self._base_name)
        choice |= self._call.extras.live(news, self._call.row_tokenizer.texts)
        fields = self._fields(news)
        if not fields:
            return self._begin + orjson.dumps(choice) + self._end
        return sse(self._call.envelope | {"choices": [choice]} | self._common | fields)

    def pieces(self, news: News) -> list[bytes]:
        """The same of any news."""
        if news.completion is None:
            return [self.small(news)]
        choice = self._call.chunk_choice(news) | auto_json(news.auto, self._base_name)
        choice |= self._call.extras.live(news, self._call.row_tokenizer.texts)
        choice |= self._call.extras.of(news.completion, self._call.row_tokenizer.texts)
        return sse_pieces(self._call.envelope | {"choices": [choice]} | self._common | self._fields(news))

    def usage(self, results: Sequence[RequestResult]) -> list[bytes]:
        """The chunk of the tokens of all answers, where it is wanted."""
        if not self._common:
            return []
        model = chosen_model((result.auto for result in results), self._base_name)
        return [sse(self._call.envelope | model | {"choices": [], "usage": usage(results)})]

    def _fields(self, news: News) -> dict[str, Any]:
        """What of a chunk, beside its choice, is its own."""
        fields = self._call.chunk_fields(news)
        if news.auto is not None:
            fields |= chosen_model([news.auto], self._base_name)
        if self._counts_each:
            key = (news.place, news.index)
            self._num_told[key] += len(news.token_ids)
            fields["usage"] = chunk_usage(len(news.prompt), self._num_told[key])
        if self._obfuscates:
            fields["obfuscation"] = obfuscation(news.text)
        return fields
