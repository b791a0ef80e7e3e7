"""Requests from the moment they are taken to the moment their result is fetched."""

import logging
import threading
from collections import deque
from collections.abc import Callable, Collection

from loraplex.engine.faults import own_fault
from loraplex.engine.request import Completion, Delta, FinishReason, RequestResult
from loraplex.engine.sched.adapter_leases import AdapterLeases
from loraplex.engine.sched.scheduler import Scheduler
from loraplex.engine.sched.sequence import RequestState, SequenceState
from loraplex.errors import EngineError, LoraplexError, QueueFullError, RequestError, TooLargeError

logger = logging.getLogger(__name__)


class RequestTracker:
    """Any thread may enqueue and cancel; the rest is for the thread that steps.

    It outlives the scheduler and the leases: after a fault it ends what they had without them, and is given new ones.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()  # a request comes before the end, or is refused
        self._inbox: dict[str, RequestState] = {}
        self._cancelled: deque[str] = deque()
        self._states: dict[str, RequestState] = {}
        self._results: dict[str, RequestResult] = {}
        self._ended_now: list[tuple[RequestState, Completion]] = []  # answers, in this step
        self._refuse: Callable[[], LoraplexError] | None = None

    def use(self, scheduler: Scheduler, leases: AdapterLeases) -> None:
        """What requests run with from now on."""
        self._scheduler, self._leases = scheduler, leases

    @property
    def has_work(self) -> bool:
        return bool(self._states or self._inbox or self._cancelled)

    def knows(self, request_id: str) -> bool:
        return request_id in self._inbox or request_id in self._states or request_id in self._results

    def enqueue(self, states: Collection[RequestState]) -> None:
        """Take requests, all or none.

        Raises what `refuse` was given, RequestError (an id in use), TooLargeError or QueueFullError (too many).
        """
        with self._lock:
            if self._refuse is not None:
                raise self._refuse()
            for state in states:
                if self.knows(state.request_id):
                    raise RequestError(f"the request id {state.request_id!r} is in use. Choose another one, or none.")
            limit = f"EngineConfig.max_waiting and max_running together ({self._most})"
            if len(states) > self._most:
                raise TooLargeError(f"{len(states)} requests at once are over {limit}. Give fewer at a time.")
            num_known = len(self._states) + len(self._inbox)
            if num_known + len(states) > self._most:
                raise QueueFullError(
                    f"{num_known} requests are in the engine, and {len(states)} more would be over {limit}. Try again "
                    "later."
                )
            self._inbox |= {state.request_id: state for state in states}

    def refuse(self, why: Callable[[], LoraplexError]) -> None:
        """Take no more requests; those that come are told why."""
        with self._lock:
            self._refuse = why

    def cancel(self, request_id: str) -> None:
        if self._refuse is None:  # else it has ended, or is about to
            self._cancelled.append(request_id)

    def take_in(self) -> list[Delta]:
        """Let the scheduler know of new requests, and end cancelled ones."""
        with self._lock:
            new = list(self._inbox.values())
            self._states |= self._inbox
            self._inbox.clear()
        for state in new:
            self._add(state)
        deltas = []
        while self._cancelled:
            state_or_none = self._states.get(self._cancelled.popleft())
            if state_or_none is not None:
                deltas += self._end_all(state_or_none)
        return deltas

    def _add(self, state: RequestState) -> None:
        for sequence in state.sequences if state.choosing is None else [state.choosing]:
            self._scheduler.add(sequence)

    def begin_answers(self, state: RequestState) -> None:
        """End the pass that a request's adapter was chosen by, if there is one, and let its answers wait to run."""
        if state.choosing is None:
            return
        self._scheduler.remove(state.choosing)
        state.choosing = None
        self._leases.release(state)  # of the base model: it holds no slot
        state.loads = None
        self._add(state)

    def close(self) -> list[Delta]:
        """End all requests that are there."""
        deltas = self.take_in()
        for state in list(self._states.values()):
            deltas += self._end_all(state)
        return deltas

    def withdraw(self, states: Collection[RequestState]) -> None:
        """Forget requests: nobody waits for them any more."""
        for state in states:
            with self._lock:
                self._inbox.pop(state.request_id, None)
            if state.request_id in self._states:
                self._end_all(state)
            self._results.pop(state.request_id, None)

    def end(self, sequence: SequenceState, reason: FinishReason, error: LoraplexError | None = None) -> list[Delta]:
        """End a sequence without another token; of a request whose adapter isn't chosen yet, all its answers."""
        if sequence.chooses:
            return self._end_all(sequence.state, reason, error)
        return [self._end(sequence, reason, error)]

    def _end(self, sequence: SequenceState, reason: FinishReason, error: LoraplexError | None) -> Delta:
        try:
            text = sequence.text.end()
        except Exception as fault:
            text, reason, error = "", "error", error or own_fault(fault, "reading the answer's tokens as text")
        reason, error = self.finish(sequence, reason, error)
        return _ending(sequence, text, reason, error)

    def finish(
        self, sequence: SequenceState, reason: FinishReason, error: LoraplexError | None = None
    ) -> tuple[FinishReason, LoraplexError | None]:
        """Free what a sequence holds; with the last of its request, end the leases and keep the result.

        Returns how it ended: with an error where what it observed can't be told.
        """
        self._scheduler.remove(sequence)
        state = sequence.state
        try:
            completion = sequence.completion(reason, error)
        except Exception as untold:  # a head predicted NaN
            completion = sequence.completion("error", error or own_fault(untold, "telling what was observed"))
        sequence.finish_reason = completion.finish_reason
        state.completions.append(completion)
        self._ended_now.append((state, completion))
        if state.is_finished:
            self._leases.release(state)
            self._keep_result(state)
        return completion.finish_reason, completion.error

    def fail_all(self, error: EngineError) -> list[Delta]:
        """End everything after a fault, also what ended in the same step: of that nobody has heard.

        Neither the scheduler nor the leases are asked: they are in the middle of something.
        """
        with self._lock:
            self._states |= self._inbox
            self._inbox.clear()
            self._cancelled.clear()
        for state, completion in self._ended_now:
            if state.request_id in self._states or self._results.pop(state.request_id, None) is not None:
                self._states[state.request_id] = state
                state.completions = [kept for kept in state.completions if kept is not completion]
        self._ended_now.clear()
        deltas = []
        for state in list(self._states.values()):
            told = {completion.index for completion in state.completions}
            for sequence in state.sequences:
                if sequence.index not in told:
                    deltas.append(_ending(sequence, "", "error", error))
                    state.completions.append(_unfinished(sequence, error))
                sequence.finish_reason = sequence.finish_reason or "error"
                sequence.main, sequence.scalings = None, []  # of a pool that is gone
            state.choosing = None
            _let_go(state)
            self._keep_result(state)
        return deltas

    def _keep_result(self, state: RequestState) -> None:
        prompt_logprobs = state.sequences[0].prompt_logprobs
        self._results[state.request_id] = RequestResult(
            request_id=state.request_id,
            prompt_token_ids=state.prompt,
            completions=tuple(sorted(state.completions, key=lambda completion: completion.index)),
            num_cached_tokens=state.num_cached_tokens,
            prompt_logprobs=None if prompt_logprobs is None else tuple(prompt_logprobs),
            auto=state.auto,
            queue_s=state.queue_s,
        )
        self._states.pop(state.request_id, None)

    def told(self) -> None:
        """A step is over: what ended in it is known outside."""
        self._ended_now.clear()

    def is_finished(self, request_id: str) -> bool:
        return request_id in self._results

    def pop_result(self, request_id: str) -> RequestResult | None:
        return self._results.pop(request_id, None)

    def _end_all(
        self, state: RequestState, reason: FinishReason = "cancelled", error: LoraplexError | None = None
    ) -> list[Delta]:
        self.begin_answers(state)
        running = [sequence for sequence in state.sequences if sequence.finish_reason is None]
        return [self._end(sequence, reason, error) for sequence in running]


def _ending(sequence: SequenceState, text: str, reason: FinishReason, error: LoraplexError | None) -> Delta:
    return Delta(
        request_id=sequence.state.request_id,
        index=sequence.index,
        token_ids=(),
        text=text,
        finish_reason=reason,
        error=error,
        auto=sequence.state.auto,
    )


def _unfinished(sequence: SequenceState, error: EngineError) -> Completion:
    """What was there of an answer; nothing of it is computed any more."""
    return Completion(
        index=sequence.index,
        text=sequence.text.total,
        token_ids=tuple(sequence.new_tokens),
        finish_reason="error",
        error=error,
    )


def _let_go(state: RequestState) -> None:
    """End a request's leases, whatever else fails."""
    binding, state.binding = state.binding, None
    try:
        if binding is not None:
            binding.close()
    except Exception:
        logger.exception("the leases of %s could not be ended", state.request_id)
