"""Run the engine's requests of one HTTP request, together, until the client leaves."""

import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace

from loraplex.adapters.names import AUTO
from loraplex.engine.frontend.output_processor import Event, OutputCollector, TakeAtOnce
from loraplex.engine.request import Completion, Delta, Request, RequestResult
from loraplex.errors import BaseModelError, CapacityError, LoraplexError, QueueFullError
from loraplex.models.auto.selection import AutoChoice
from loraplex.routing.adapter_spec import is_auto
from loraplex.server.api.api_errors import BAD_REQUEST, SHUTTING_DOWN, TOO_LARGE, ApiError
from loraplex.server.api.response_parts import News
from loraplex.server.api.streaming import BodyChannel
from loraplex.server.auth.access import adapter_names
from loraplex.server.state import RequestContext, ServerState


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

    async def batches(self, at_once: TakeAtOnce | None = None) -> AsyncIterator[list[Event]]:
        """What is new, until all requests are finished; but for what `at_once` took (of `writer`)."""
        results: list[RequestResult] = []
        while len(results) < self.num_requests:
            events = await self._take(None if self.first_token_s is None else at_once)
            if self.first_token_s is None:
                self.first_token_s = time.perf_counter() - self._started
                self._state.metrics.first_token(self._adapters, self.first_token_s)
            results += [event for event in events if isinstance(event, RequestResult)]
            if len(results) == self.num_requests:
                self._account(results)
            yield events

    def writer(self, channel: BodyChannel | None, render: Callable[[News], bytes]) -> TakeAtOnce | None:
        """For `batches`: writes tokens to the connection as the engine tells them, while its reader keeps up.

        Ends of answers, and long news, are left to the reader's task.
        """
        if channel is None:
            return None

        def write(events: Sequence[Event]) -> bool:
            if not channel.is_open or not all(map(_is_plain, events)):
                return False
            self.charge(events)
            found, _ = self.gather(events, holds_end=False)
            channel.write(b"".join(map(render, found)))
            return True

        return write

    async def _take(self, at_once: TakeAtOnce | None = None) -> list[Event]:
        try:
            events = await self._feed.take(at_once)
            self.charge(events)
            return events
        except LoraplexError as error:
            raise self._context.refusal(error) from error

    def charge(self, events: Sequence[Event]) -> None:
        """Let the key pay for tokens as they are made, whoever waits for them."""
        count = 0
        for event in events:
            if event.auto is not None:
                count += self._note_choice(event.request_id, event.auto)
            if self._context.usage is None:
                continue
            if isinstance(event, Delta):
                self._told[event.request_id, event.index] += len(event.token_ids)
                count += len(event.token_ids)
            else:  # what no delta has told
                count += sum(
                    max(0, len(completion.token_ids) - self._told[event.request_id, completion.index])
                    for completion in event.completions
                )
        self._context.spend_tokens(count)

    def _note_choice(self, request_id: str, choice: AutoChoice) -> int:
        """Let logs and metrics know what `auto` chose; returns the tokens of the prompt that are run once more."""
        if request_id in self._chosen:
            return 0
        self._chosen[request_id] = choice
        self._adapters = () if choice.name is None else (choice.name,)
        names = {chosen.name or self._state.catalog.base_name for chosen in self._chosen.values()}
        scores = [None if c.score is None else round(c.score, 3) for c in self._chosen.values()]
        self._context.log |= {"model": ",".join(sorted(names)), "auto_scores": scores}
        return 0 if choice.name is None else len(self.prompts[self.places[request_id]])

    def check(self, ended: Completion | Delta) -> None:
        """Raise what a client must be told of an answer that didn't end as it should."""
        if ended.finish_reason == "cancelled":
            raise ApiError(SHUTTING_DOWN, "the server is shutting down; this answer was not finished. Try again.")
        if ended.finish_reason == "error":
            error = ended.error or LoraplexError("the answer failed")
            raise self._context.refusal(error)

    def gather(self, events: Sequence[Event], *, holds_end: bool) -> tuple[list[News], ApiError | None]:
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
                news = found.get((place, event.index))
                if news is None:
                    news = found[place, event.index] = News(place, event.index, self.prompts[place])
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


def _is_plain(event: Event) -> bool:
    """Whether it is a token with little beside it, and the answer goes on."""
    return isinstance(event, Delta) and event.finish_reason is None and len(event.logprobs) + len(event.scalings) <= 1


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
