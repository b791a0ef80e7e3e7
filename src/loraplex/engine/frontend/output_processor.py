"""From the results of a pass to the sequences' next tokens, and to the readers that wait for them."""

import asyncio
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

from loraplex.engine.faults import own_fault
from loraplex.engine.frontend.input_processor import InputProcessor
from loraplex.engine.request import Delta, FinishReason, RequestResult, TokenScalings
from loraplex.engine.sampling.logprobs import TokenLogprobs, token_logprobs
from loraplex.engine.sched.request_tracker import RequestTracker
from loraplex.engine.sched.sequence import SequenceState
from loraplex.engine.stats import StepCounts
from loraplex.engine.worker.model_runner import ModelRunnerOutput
from loraplex.errors import EngineError

Event = Delta | RequestResult
TakeAtOnce = Callable[[Sequence[Event]], bool]  # whether it took them


class OutputProcessor:
    """Chooses tokens, tells what is new, and ends answers that are complete."""

    def __init__(self, input_processor: InputProcessor, tracker: RequestTracker, counts: StepCounts) -> None:
        self._input_processor = input_processor
        self._tracker = tracker
        self._counts = counts

    def take(self, results: Sequence[ModelRunnerOutput]) -> list[Delta]:
        """Use what a pass gave; scaling passes first, whose results the next main passes need.

        What fails in a sequence's own work ends it; what all share is not touched there.
        """
        deltas = []
        for result in sorted(results, key=lambda result: result.chunk.scaling is None):
            chunk, sequence = result.chunk, result.chunk.sequence
            if sequence.finish_reason is not None:
                continue
            try:
                step = self._own_step(result)
            except Exception as error:
                deltas += self._tracker.end(sequence, "error", own_fault(error, "using what the pass gave"))
                continue
            chunk.kv.cache_full_blocks(len(chunk.kv.tokens))
            if step is not None:
                deltas.append(self._told(sequence, step))
        return deltas

    def _own_step(self, result: ModelRunnerOutput) -> "_Step | None":
        """What a chunk's result is to its sequence alone."""
        chunk, sequence = result.chunk, result.chunk.sequence
        if chunk.scaling is not None:
            assert result.hidden is not None, "a scaling pass returned no hidden states"
            chunk.scaling.took(chunk.start, result.hidden, result.best)
            return None
        if sequence.chooses:
            self._choose(result)
            return None
        for scaling in sequence.scalings:
            scaling.forget(chunk.stop)  # the main pass has used it
        if result.error is not None:
            raise result.error
        if sequence.captures is not None:
            sequence.captures.saw(chunk.start, chunk.stop, result.scalings)
        if result.all_logits is not None:
            _keep_prompt_logprobs(result)
        if sequence.hidden is not None:
            return self._pooled(sequence, result)
        return self._next_token(sequence, result) if chunk.wants_logits else None

    def _choose(self, result: ModelRunnerOutput) -> None:
        """With a prompt's last token, choose the request's adapter."""
        chunk, state = result.chunk, result.chunk.sequence.state
        if chunk.stop < len(chunk.kv.tokens):
            return
        assert result.hidden is not None, "a pass that an adapter is chosen by returned no hidden states"
        self._input_processor.choose(state, result.hidden[-1])
        chunk.kv.cache_full_blocks(len(chunk.kv.tokens))  # a base row's, which its blocks are given back with
        self._tracker.begin_answers(state)

    def _pooled(self, sequence: SequenceState, result: ModelRunnerOutput) -> "_Step | None":
        """Keep the hidden states of a prompt, whose last chunk ends it."""
        assert sequence.hidden is not None and result.hidden is not None, "no hidden states came"  # noqa: PT018
        sequence.hidden.saw(result.chunk.start, result.hidden)
        return _Step(None, "", (), (), "stop") if result.chunk.stop == len(sequence.tokens) else None

    def _next_token(self, sequence: SequenceState, result: ModelRunnerOutput) -> "_Step":
        logits, sampler = result.logits, sequence.sampler
        assert logits is not None, "a main pass that ends a sequence's tokens returned no logits"
        assert result.best is not None, "logits came without their largest"
        token = result.best if sampler.is_plain_greedy else sampler.choose(logits)
        sampler.took(token)
        sequence.tokens.append(token)
        for scaling in sequence.scalings:
            self._counts.add_draft(scaling.settle())
        logprobs: tuple[TokenLogprobs, ...] = ()
        num_top = sampler.sampling.logprobs
        if num_top is not None:
            logprobs = (token_logprobs(logits, token, num_top),)
            sequence.logprobs += logprobs
        text = self._text_of(sequence, token)
        scalings = () if sequence.captures is None else sequence.captures.step_scalings()
        reason = self._finish_reason(sequence, token)
        if reason is not None:
            text += sequence.text.end()
        return _Step(token, text, logprobs, scalings, reason)

    def _told(self, sequence: SequenceState, step: "_Step") -> Delta:
        """Tell what a token added; end the sequence if it was its last."""
        reason, error = step.reason, None
        if step.token is not None:
            self._note_time(sequence)
        if reason is not None:
            reason, error = self._tracker.finish(sequence, reason)
        return Delta(
            request_id=sequence.state.request_id,
            index=sequence.index,
            token_ids=() if step.token is None else (step.token,),
            text=step.text,
            logprobs=step.logprobs,
            finish_reason=reason,
            error=error,
            scalings=step.scalings,
            auto=sequence.state.auto,
        )

    def _text_of(self, sequence: SequenceState, token: int) -> str:
        """The certain text that a new token adds; of one that ends the answer none, unless that is wanted."""
        if self._ends(sequence, token) and not sequence.sampler.sampling.include_stop:
            return ""
        may_stop = sequence.num_new >= sequence.sampler.sampling.min_tokens
        return sequence.text.add(token, may_stop=may_stop)

    def _ends(self, sequence: SequenceState, token: int) -> bool:
        sampler = sequence.sampler
        return token in sampler.end_tokens and sequence.num_new >= sampler.sampling.min_tokens

    def _note_time(self, sequence: SequenceState) -> None:
        """Count the time since the sequence's token before."""
        now = time.perf_counter()
        if sequence.last_token_s is not None:
            self._counts.token_times.add(now - sequence.last_token_s)
        sequence.last_token_s = now

    def _finish_reason(self, sequence: SequenceState, token: int) -> FinishReason | None:
        sampler = sequence.sampler
        if sampler.constraint is not None and sampler.constraint.is_complete:
            return "stop"  # whatever min_tokens is: nothing can follow
        if self._ends(sequence, token) or sequence.text.is_stopped:
            return "stop"
        return "length" if sequence.num_new >= sequence.state.max_new_tokens else None


class _Step(NamedTuple):
    """A token that was chosen, and what came with it."""

    token: int | None  # None: the prompt's hidden states are known
    text: str
    logprobs: tuple[TokenLogprobs, ...]
    scalings: tuple[TokenScalings, ...]
    reason: FinishReason | None  # of the answer's end


def _keep_prompt_logprobs(result: ModelRunnerOutput) -> None:
    """What a chunk of the prompt tells about the token after each of its tokens."""
    chunk, sequence = result.chunk, result.chunk.sequence
    kept, num_top = sequence.prompt_logprobs, sequence.sampler.sampling.prompt_logprobs
    assert kept is not None, "logits of a prompt came that weren't asked for"
    assert num_top is not None, "a prompt's probabilities are kept though they aren't wanted"
    assert result.all_logits is not None, "a chunk of the prompt returned no logits"
    for logits, position in zip(result.all_logits, range(chunk.start + 1, chunk.stop + 1), strict=True):
        if position < len(kept):
            kept[position] = token_logprobs(logits, sequence.tokens[position], num_top)


class OutputCollector:
    """What the engine's thread tells one reader, who is on an event loop, about one or more requests.

    A slow reader finds more events at once, never a longer queue of calls.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, *, wants_deltas: bool = True) -> None:
        self.loop = loop
        self.wants_deltas = wants_deltas
        self.prompts: dict[str, tuple[int, ...]] = {}  # of the requests, by id: as they run, with images' tokens
        self._events: list[Event] = []
        self._error: Exception | None = None
        self._arrived = asyncio.Event()
        self._at_once: TakeAtOnce | None = None  # of a reader that waits

    def put(self, events: Sequence[Event]) -> None:
        """Add events; called on the reader's loop."""
        if self._error is not None:  # what follows a fault is not told: it would be with a gap
            return
        if self._at_once is not None and not self._arrived.is_set():
            try:
                if self._at_once(events):
                    return
            except Exception as error:  # the reader's own, who must not wait for ever
                self._error = error
                events = ()
        self._events += events
        self._arrived.set()

    def fail(self, error: EngineError) -> None:
        """No more events will come; called on the reader's loop."""
        self._error = error
        self._arrived.set()

    def untaken(self) -> list[Event]:
        """What came for a reader that won't take it."""
        events, self._events = self._events, []
        return events

    async def take(self, at_once: "TakeAtOnce | None" = None) -> list[Event]:
        """Everything that is new since the last call; waits until there is something.

        While it waits, `at_once` may take events as they come, before anyone is woken: a task for each token of each
        stream costs more than the token. What it doesn't take is returned. Raises what it raises, and EngineError if
        the engine failed in such a way that no results came.
        """
        self._at_once = at_once
        try:
            await self._arrived.wait()
        finally:
            self._at_once = None
        events, self._events = self._events, []
        if self._error is None:
            self._arrived.clear()
        elif not events:
            raise self._error
        return events


def deliver(news: Mapping[OutputCollector, Collection[Event]]) -> None:
    """Hand out what one step gave: a single call for each event loop, not one for each token."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[OutputCollector, list[Event]]]] = {}
    for collector, events in news.items():
        by_loop.setdefault(collector.loop, []).append((collector, list(events)))
    for loop, collectors in by_loop.items():
        _call(loop, _put_all, collectors)


def fail(collectors: Collection[OutputCollector], error: EngineError) -> None:
    """Let no reader wait any longer, each with an error of its own."""
    for collector in collectors:
        told = type(error)(str(error))
        told.__cause__ = error.__cause__
        _call(collector.loop, collector.fail, told)


def _call(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *arguments: object) -> None:
    try:
        loop.call_soon_threadsafe(function, *arguments)
    except RuntimeError:
        if not loop.is_closed():  # its readers are gone with it
            raise


def _put_all(collectors: Sequence[tuple[OutputCollector, list[Event]]]) -> None:
    for collector, events in collectors:
        collector.put(events)
