"""Run the engine's requests of one HTTP request: together, until the client leaves."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import TypeVar

from starlette.types import Receive

from loraplex.engine.frontend.output_collector import OutputCollector
from loraplex.engine.request import Completion, Delta, Request, RequestResult
from loraplex.errors import BaseModelError, CapacityError, LoraplexError, QueueFullError
from loraplex.server.api.api_errors import BAD_REQUEST, SHUTTING_DOWN, TOO_LARGE, ApiError, as_api_error
from loraplex.server.auth.access import adapter_names
from loraplex.server.state import RequestContext, ServerState

T = TypeVar("T")


class ClientLeft(Exception):
    """The client closed its connection before it had its answer."""


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
        self.places: dict[str, int] = {}  # of the requests, by their ids in the engine
        self.num_requests = len(requests)
        self._has_begun = False
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
            if not self._has_begun:
                self._has_begun = True
                self._state.metrics.first_token(self._adapters, time.perf_counter() - self._started)
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
            raise as_api_error(error, may_see_all=self._context.principal.may_manage) from error

    def charge(self, events: Sequence[Delta | RequestResult]) -> None:
        """Let the key pay for tokens as they are made, whoever waits for them."""
        count = 0
        for event in events:
            if isinstance(event, Delta):
                self._told[event.request_id, event.index] += len(event.token_ids)
                count += len(event.token_ids)
            else:  # what no delta has told
                count += sum(
                    max(0, len(completion.token_ids) - self._told[event.request_id, completion.index])
                    for completion in event.completions
                )
        self._context.spend_tokens(count)

    def check(self, ended: Completion | Delta) -> None:
        """Raise what a client must be told of an answer that didn't end as it should."""
        if ended.finish_reason == "cancelled":
            raise ApiError(SHUTTING_DOWN, "the server is shutting down; this answer was not finished. Try again.")
        if ended.finish_reason == "error":
            error = ended.error or LoraplexError("the answer failed")
            raise as_api_error(error, may_see_all=self._context.principal.may_manage)

    def _account(self, results: Sequence[RequestResult]) -> None:
        num_prompt = sum(len(result.prompt_token_ids) for result in results)
        num_new = sum(len(completion.token_ids) for result in results for completion in result.completions)
        num_cached = sum(result.num_cached_tokens for result in results)
        self._context.log |= {"prompt_tokens": num_prompt, "new_tokens": num_new, "cached_tokens": num_cached}
        if self._state.config.logs.log_prompts:
            texts = [completion.text for result in results for completion in result.completions]
            self._context.log["answers"] = texts
        seconds = time.perf_counter() - self._started
        self._state.metrics.finished(self._adapters, seconds=seconds, num_prompt=num_prompt, num_new=num_new)
        self._state.metrics.cached(num_cached)


@asynccontextmanager
async def running(
    state: ServerState, context: RequestContext, requests: Sequence[Request], *, wants_deltas: bool
) -> AsyncIterator[Run]:
    """Give the requests to the engine; whatever isn't finished at the end of the block is cancelled."""
    counts_tokens = context.usage is not None and context.usage.counts_tokens
    feed = state.engine.collector(wants_deltas=wants_deltas or counts_tokens)
    run = Run(state, context, requests, feed)
    context.log["model"] = "+".join(adapter_names(requests[0].adapters)) or state.catalog.base_name
    try:
        for place, request in enumerate(requests):
            request_id = await _submit(state, context, request, feed)
            run.places[request_id] = place
            context.spend_tokens(len(request.prompt))
        yield run
    finally:
        for request_id in run.places:
            state.engine.drop(request_id)
        run.charge(feed.untaken())


async def _submit(state: ServerState, context: RequestContext, request: Request, feed: OutputCollector) -> str:
    try:
        return await state.engine.submit(request, feed)
    except QueueFullError as error:
        raise as_api_error(error, may_see_all=context.principal.may_manage) from error
    except CapacityError as error:  # of one that is refused at once: it could never run
        raise ApiError(TOO_LARGE, str(error)) from error
    except BaseModelError as error:
        raise ApiError(BAD_REQUEST, str(error), quotes_request=True) from error
    except LoraplexError as error:
        raise _refused(error, state, context) from error


def _refused(error: LoraplexError, state: ServerState, context: RequestContext) -> ApiError:
    if state.is_draining:
        return ApiError(SHUTTING_DOWN, "the server is shutting down. Try again.")
    return as_api_error(error, may_see_all=context.principal.may_manage)


async def until_client_leaves(receive: Receive, work: Coroutine[object, object, T]) -> T:
    """The work's result; if the client leaves first, the work is cancelled and ClientLeft raised."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientLeft
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
