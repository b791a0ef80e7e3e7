"""Requests from the moment they are taken to the moment their result is fetched."""

from collections import deque
from collections.abc import Collection

from loraplex.engine.generation import Generation, RequestState
from loraplex.engine.leases import Leases
from loraplex.engine.request import Delta, FinishReason, RequestResult
from loraplex.engine.scheduler import Scheduler
from loraplex.errors import LoraplexError, QueueFullError, RequestError


class RequestBook:
    """Any thread may enqueue and cancel; the rest is for the thread that steps."""

    def __init__(self, scheduler: Scheduler, leases: Leases, most: int) -> None:
        self._scheduler = scheduler
        self._leases = leases
        self._most = most
        self._inbox: deque[RequestState] = deque()
        self._cancelled: deque[str] = deque()
        self._states: dict[str, RequestState] = {}
        self._results: dict[str, RequestResult] = {}
        self.is_closed = False

    @property
    def has_work(self) -> bool:
        return bool(self._states or self._inbox or self._cancelled)

    def knows(self, request_id: str) -> bool:
        return request_id in self._states or request_id in self._results

    def enqueue(self, states: Collection[RequestState]) -> None:
        """Take requests; raises RequestError (closed) or QueueFullError (too many)."""
        if self.is_closed:
            raise RequestError("the engine is closed. Make a new one: loraplex.Engine(model).")
        num_known = len(self._states) + len(self._inbox)
        if num_known + len(states) > self._most:
            raise QueueFullError(
                f"{num_known} requests are in the engine, and {len(states)} more would be over EngineConfig."
                f"max_waiting and max_running together ({self._most}). Try again later."
            )
        self._inbox.extend(states)

    def cancel(self, request_id: str) -> None:
        self._cancelled.append(request_id)

    def take_in(self) -> list[Delta]:
        """Let the scheduler know of new requests, and end cancelled ones."""
        while self._inbox:
            state = self._inbox.popleft()
            self._states[state.request_id] = state
            for generation in state.generations:
                self._scheduler.add(generation)
        deltas = []
        while self._cancelled:
            state_or_none = self._states.get(self._cancelled.popleft())
            if state_or_none is not None:
                deltas += self._end_all(state_or_none)
        return deltas

    def close(self) -> list[Delta]:
        """Take no more requests and end those that are there."""
        self.is_closed = True
        deltas = self.take_in()
        for state in list(self._states.values()):
            deltas += self._end_all(state)
        return deltas

    def end(self, generation: Generation, reason: FinishReason, error: LoraplexError | None = None) -> Delta:
        """End a generation without another token."""
        text = generation.text.end()
        reason, error = self.finish(generation, reason, error)
        return Delta(
            request_id=generation.state.request_id,
            index=generation.index,
            token_ids=(),
            text=text,
            finish_reason=reason,
            error=error,
        )

    def finish(
        self, generation: Generation, reason: FinishReason, error: LoraplexError | None = None
    ) -> tuple[FinishReason, LoraplexError | None]:
        """Free what a generation holds; with the last of its request, end the leases and keep the result.

        Returns how it ended: with an error where what it observed can't be told.
        """
        self._scheduler.remove(generation)
        state = generation.state
        try:
            completion = generation.completion(reason, error)
        except LoraplexError as untold:  # a head predicted NaN
            completion = generation.completion("error", error or untold)
        generation.finish_reason = completion.finish_reason
        state.completions.append(completion)
        if state.is_finished:
            self._keep_result(state)
        return completion.finish_reason, completion.error

    def _keep_result(self, state: RequestState) -> None:
        self._leases.release(state)
        del self._states[state.request_id]
        prompt_logprobs = state.generations[0].prompt_logprobs
        self._results[state.request_id] = RequestResult(
            request_id=state.request_id,
            prompt_token_ids=state.prompt,
            completions=tuple(sorted(state.completions, key=lambda completion: completion.index)),
            num_cached_tokens=state.num_cached_tokens,
            prompt_logprobs=None if prompt_logprobs is None else tuple(prompt_logprobs),
        )

    def is_finished(self, request_id: str) -> bool:
        return request_id in self._results

    def pop_result(self, request_id: str) -> RequestResult | None:
        return self._results.pop(request_id, None)

    def _end_all(self, state: RequestState) -> list[Delta]:
        running = [generation for generation in state.generations if generation.finish_reason is None]
        return [self.end(generation, "cancelled") for generation in running]
