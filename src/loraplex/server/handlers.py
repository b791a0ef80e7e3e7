"""Run the engine's requests of one HTTP request, together, until the client leaves; answer it whole or as a stream."""

import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

from fastapi import Request as HttpRequest
from starlette.responses import Response

from loraplex.adapters.names import AUTO
from loraplex.engine.frontend.output_processor import OutputCollector
from loraplex.engine.request import Completion, Delta, Request, RequestResult
from loraplex.errors import BaseModelError, CapacityError, LoraplexError, QueueFullError
from loraplex.models.auto.selection import AutoChoice
from loraplex.routing.adapter_spec import AdapterSpec, is_auto
from loraplex.server.api.api_errors import BAD_REQUEST, SHUTTING_DOWN, TOO_LARGE, ApiError
from loraplex.server.api.bodies import GenerationBody, StreamOptions
from loraplex.server.api.json_route import documented
from loraplex.server.api.response_parts import Extras, News, auto_json, chosen_model, chunk_usage, obfuscation, usage
from loraplex.server.api.streaming import EventStream, PiecesResponse, gathered, json_pieces, sse, sse_pieces
from loraplex.server.auth.access import adapter_names
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
        return await _stream(call, body, state, context)
    pieces = await until_client_leaves(http.receive, _whole(call, state, context))
    return PiecesResponse(pieces, state.config.limits.stall_timeout_s)


async def _whole(call: ApiCall, state: ServerState, context: RequestContext) -> list[bytes]:
    async with running(state, context, call.requests, wants_deltas=False) as run:
        results = await run.results()
    return await state.workers.run(context.owner, lambda: gathered(json_pieces(call.answer(results))))


async def _stream(call: ApiCall, body: GenerationBody, state: ServerState, context: RequestContext) -> Response:
    """What is refused is refused here, with its status; the stream begins when the engine has the requests."""
    stack = AsyncExitStack()
    run = await stack.enter_async_context(running(state, context, call.requests, wants_deltas=True))
    chunks = _chunks(run, call, state, context, body.stream_options or StreamOptions())
    return EventStream(chunks, state.config.limits.stall_timeout_s, stack.aclose)


async def _chunks(
    run: "Run", call: ApiCall, state: ServerState, context: RequestContext, options: StreamOptions
) -> AsyncGenerator[bytes, None]:
    """The answer's chunks: for each answer that has news one, then what extensions add, then the usage."""
    results: list[RequestResult] = []
    told: Counter[tuple[int, int]] = Counter()  # tokens of each answer
    common: dict[str, Any] = {"usage": None} if options.include_usage else {}

    def chunk(news: News) -> list[bytes]:
        base_name = state.catalog.base_name
        choice = call.chunk_choice(news) | auto_json(news.auto, base_name)
        choice |= call.extras.live(news, call.row_tokenizer.texts)
        if news.completion is not None:
            choice |= call.extras.of(news.completion, call.row_tokenizer.texts)
        whole = call.envelope | chosen_model([news.auto], base_name) | call.chunk_fields(news)
        whole |= {"choices": [choice]} | common
        if options.include_usage and options.continuous_usage_stats:
            told[news.place, news.index] += len(news.token_ids)
            whole["usage"] = chunk_usage(len(news.prompt), told[news.place, news.index])
        if options.include_obfuscation:
            whole["obfuscation"] = obfuscation(news.text)
        return [sse(whole)] if news.completion is None else sse_pieces(whole)

    async for events in run.batches():
        found, failure = run.gather(events, holds_end=call.extras.any)
        for news in found:
            write = partial(chunk, news)
            for piece in await state.workers.run(context.owner, write) if news.is_large else write():
                yield piece
        if failure is not None:  # what came before it has been told
            raise failure
        results += [event for event in events if isinstance(event, RequestResult)]
    if options.include_usage:
        model = chosen_model((result.auto for result in results), state.catalog.base_name)
        yield sse(call.envelope | model | {"choices": [], "usage": usage(results)})


class Run:
    """Requests in the engine that one reader waits for."""

    def __init__(
        self, state: ServerState, context: RequestContext, requests: Sequence[Request], feed: OutputCollector
    ) -> None:
        self._state = state
        self._context = context
        self._feed = feed
        self._started = time.perf_counter()
        self._adapters = adapter_names(requests[0].adapters)
        self.prompts: list[Sequence[int]] = []  # as they run, in the requests' order
        self._chosen: dict[str, AutoChoice] = {}  # by request, of `auto`
        self.places: dict[str, int] = {}  # of the requests, by their ids in the engine
        self.num_requests = len(requests)
        self.first_token_s: float | None = None
        self.finished: Sequence[RequestResult] = ()
        self._told: Counter[tuple[str, int]] = Counter()  # tokens of each answer that its deltas have brought

    async def results(self) -> list[RequestResult]:
        """All results, in the requests' order; raises ApiError for the first that failed."""
        found: dict[int, RequestResult] = {}
        while len(found) < self.num_requests:
            for event in await self._take():
                if isinstance(event, RequestResult):
                    found[self.places[event.request_id]] = event
                    for completion in event.completions:
                        self.check(completion)
        results = [found[place] for place in range(self.num_requests)]
        self._account(results)
        return results

    async def batches(self) -> AsyncIterator[list[Delta | RequestResult]]:
        """What is new, until all requests are finished."""
        results: list[RequestResult] = []
        while len(results) < self.num_requests:
            events = await self._take()
            if self.first_token_s is None:
                self.first_token_s = time.perf_counter() - self._started
                self._state.metrics.first_token(self._adapters, self.first_token_s)
            results += [event for event in events if isinstance(event, RequestResult)]
            if len(results) == self.num_requests:
                self._account(results)
            yield events

    async def _take(self) -> list[Delta | RequestResult]:
        try:
            events = await self._feed.take()
            self.charge(events)
            return events
        except LoraplexError as error:
            raise self._context.refusal(error) from error

    def charge(self, events: Sequence[Delta | RequestResult]) -> None:
        """Let the key pay for tokens as they are made, whoever waits for them."""
        count = 0
        for event in events:
            count += self._note_choice(event)
            if isinstance(event, Delta):
                self._told[event.request_id, event.index] += len(event.token_ids)
                count += len(event.token_ids)
            else:  # what no delta has told
                count += sum(
                    max(0, len(completion.token_ids) - self._told[event.request_id, completion.index])
                    for completion in event.completions
                )
        self._context.spend_tokens(count)

    def _note_choice(self, event: Delta | RequestResult) -> int:
        """Let logs and metrics know what `auto` chose; returns the tokens of the prompt that are run once more."""
        choice = event.auto
        if choice is None or event.request_id in self._chosen:
            return 0
        self._chosen[event.request_id] = choice
        self._adapters = () if choice.name is None else (choice.name,)
        names = {chosen.name or self._state.catalog.base_name for chosen in self._chosen.values()}
        scores = [None if c.score is None else round(c.score, 3) for c in self._chosen.values()]
        self._context.log |= {"model": ",".join(sorted(names)), "auto_scores": scores}
        return 0 if choice.name is None else len(self.prompts[self.places[event.request_id]])

    def check(self, ended: Completion | Delta) -> None:
        """Raise what a client must be told of an answer that didn't end as it should."""
        if ended.finish_reason == "cancelled":
            raise ApiError(SHUTTING_DOWN, "the server is shutting down; this answer was not finished. Try again.")
        if ended.finish_reason == "error":
            error = ended.error or LoraplexError("the answer failed")
            raise self._context.refusal(error)

    def gather(self, events: Sequence[Delta | RequestResult], *, holds_end: bool) -> tuple[list[News], ApiError | None]:
        """One News for each answer, up to the first failure.

        With `holds_end` an answer's finish_reason comes with what extensions add.
        """
        found: dict[tuple[int, int], News] = {}
        last: list[News] = []
        for event in events:
            place = self.places[event.request_id]
            if isinstance(event, Delta):
                try:
                    self.check(event)
                except ApiError as error:
                    return list(found.values()), error
                news = found.setdefault((place, event.index), News(place, event.index, self.prompts[place]))
                news.add(event)
                if holds_end:
                    news.finish_reason = None
            elif holds_end:
                last += [
                    News(
                        place,
                        completion.index,
                        self.prompts[place],
                        finish_reason=completion.finish_reason,
                        completion=completion,
                        auto=event.auto,
                    )
                    for completion in event.completions
                ]
        return [*found.values(), *last], None

    def _account(self, results: Sequence[RequestResult]) -> None:
        self.finished = results
        num_prompt = sum(len(result.prompt_token_ids) for result in results)
        num_new = sum(len(completion.token_ids) for result in results for completion in result.completions)
        num_cached = sum(result.num_cached_tokens for result in results)
        self._context.log |= {"prompt_tokens": num_prompt, "new_tokens": num_new, "cached_tokens": num_cached}
        if self._state.config.logs.log_prompts:
            texts = [completion.text for result in results for completion in result.completions]
            self._context.log["answers"] = texts
        seconds = time.perf_counter() - self._started
        for adapters, group in self._by_adapters(results).items():
            own_prompt = sum(len(result.prompt_token_ids) for result in group)
            own_new = sum(len(completion.token_ids) for result in group for completion in result.completions)
            self._state.metrics.finished(adapters, seconds=seconds, num_prompt=own_prompt, num_new=own_new)
        self._state.metrics.cached(num_cached)

    def _by_adapters(self, results: Sequence[RequestResult]) -> dict[tuple[str, ...], list[RequestResult]]:
        """All have the same, unless each prompt chose its own."""
        groups: dict[tuple[str, ...], list[RequestResult]] = {}
        for result in results:
            chosen = self._chosen.get(result.request_id)
            own = self._adapters if chosen is None else () if chosen.name is None else (chosen.name,)
            groups.setdefault(own, []).append(result)
        return groups


@asynccontextmanager
async def running(
    state: ServerState, context: RequestContext, requests: Sequence[Request], *, wants_deltas: bool
) -> AsyncIterator[Run]:
    """Give the requests to the engine; whatever isn't finished at the end of the block is cancelled.

    All calls come through here: `auto` chooses among what the caller may use, and nothing else.
    """
    if any(is_auto(request.adapters) for request in requests):
        candidates = await state.workers.run(context.owner, lambda: state.catalog.candidates(context.principal))
        requests = [replace(request, candidates=candidates) for request in requests]
    counts_tokens = context.usage is not None and context.usage.counts_tokens
    feed = state.engine.collector(wants_deltas=wants_deltas or counts_tokens)
    run = Run(state, context, requests, feed)
    asked = "+".join(adapter_names(requests[0].adapters)) or state.catalog.base_name
    context.log["model"] = AUTO if is_auto(requests[0].adapters) else asked
    with _traced(state, context, run, requests):
        async with _submitted(state, context, run, requests, feed):
            yield run


@asynccontextmanager
async def _submitted(
    state: ServerState, context: RequestContext, run: "Run", requests: Sequence[Request], feed: OutputCollector
) -> AsyncIterator[None]:
    try:
        for place, request in enumerate(requests):
            request_id = await _submit(state, context, request, feed)
            run.places[request_id] = place
            run.prompts.append(feed.prompts[request_id])
            context.spend_tokens(len(run.prompts[place]))
        yield
    finally:
        for request_id in run.places:
            state.engine.drop(request_id)
        run.charge(feed.untaken())


@contextmanager
def _traced(state: ServerState, context: RequestContext, run: "Run", requests: Sequence[Request]) -> Iterator[None]:
    """The span of what the block does, where traces are wanted."""
    tracing = state.tracing
    if tracing is None:
        yield
        return
    span = tracing.begin_generation(context.span, context.path, context.log["model"], requests)
    error: BaseException | None = None
    try:
        yield
    except BaseException as failure:
        error = failure
        raise
    finally:
        told = context.response | ({"model": context.log["model"]} if context.response else {})
        tracing.end_generation(span, results=run.finished, response=told, first_token_s=run.first_token_s, error=error)


async def _submit(state: ServerState, context: RequestContext, request: Request, feed: OutputCollector) -> str:
    try:
        return await state.engine.submit(request, feed)
    except QueueFullError as error:
        raise context.refusal(error) from error
    except CapacityError as error:  # of one that is refused at once: it could never run
        raise ApiError(TOO_LARGE, str(error)) from error
    except BaseModelError as error:
        raise ApiError(BAD_REQUEST, str(error), quotes_request=True) from error
    except LoraplexError as error:
        raise _refused(error, state, context) from error


def _refused(error: LoraplexError, state: ServerState, context: RequestContext) -> ApiError:
    if state.is_draining:
        return ApiError(SHUTTING_DOWN, "the server is shutting down. Try again.")
    return context.refusal(error)
