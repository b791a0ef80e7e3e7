"""From the results of a pass to the generations' next tokens."""

from collections.abc import Sequence
from typing import NamedTuple

from loraplex.engine.faults import own_fault
from loraplex.engine.frontend.input_processor import Intake
from loraplex.engine.request import Delta, FinishReason, TokenLogprobs, TokenScalings
from loraplex.engine.sampling.sampler import token_logprobs
from loraplex.engine.sched.request_tracker import RequestBook
from loraplex.engine.sched.sequence import Generation
from loraplex.engine.stats import StepCounts
from loraplex.engine.worker.model_runner import PartResult


class Answers:
    """Chooses tokens, tells what is new, and ends answers that are complete."""

    def __init__(self, intake: Intake, book: RequestBook, counts: StepCounts) -> None:
        self._intake = intake
        self._book = book
        self._counts = counts

    def take(self, results: Sequence[PartResult]) -> list[Delta]:
        """Use what a pass gave; scaling passes first, whose results the next main passes need.

        What fails in a generation's own work ends it; what all share is not touched there.
        """
        deltas = []
        for result in sorted(results, key=lambda result: result.part.scaling is None):
            part, generation = result.part, result.part.generation
            if generation.finish_reason is not None:
                continue
            try:
                step = self._own_step(result)
            except Exception as error:
                deltas.append(self._book.end(generation, "error", own_fault(error, "using what the pass gave")))
                continue
            part.track.name_blocks(len(part.track.tokens))
            if step is not None:
                deltas.append(self._told(generation, step))
        return deltas

    def _own_step(self, result: PartResult) -> "_Step | None":
        """What a part's result is to its generation alone."""
        part, generation = result.part, result.part.generation
        if part.scaling is not None:
            assert result.hidden is not None, "a scaling pass returned no hidden states"
            part.scaling.took(part.start, result.hidden, result.best)
            return None
        for scaling in generation.scalings:
            scaling.forget(part.stop)  # the main pass has used it
        if result.error is not None:
            raise result.error
        if generation.observations is not None:
            generation.observations.saw(part.start, part.stop, result.scalings)
        if result.all_logits is not None:
            _keep_prompt_logprobs(result)
        return self._next_token(generation, result) if part.wants_logits else None

    def _next_token(self, generation: Generation, result: PartResult) -> "_Step":
        logits, chooser = result.logits, generation.chooser
        assert logits is not None, "a main pass that ends a generation's tokens returned no logits"
        assert result.best is not None, "logits came without their largest"
        token = result.best if chooser.is_plain_greedy else chooser.choose(logits)
        chooser.took(token)
        generation.tokens.append(token)
        for scaling in generation.scalings:
            self._counts.add_draft(scaling.settle())
        logprobs: tuple[TokenLogprobs, ...] = ()
        num_top = chooser.sampling.logprobs
        if num_top is not None:
            logprobs = (token_logprobs(logits, token, num_top),)
            generation.logprobs += logprobs
        text = generation.text.add(token)
        scalings = () if generation.observations is None else generation.observations.step_scalings()
        reason = self._finish_reason(generation, token)
        if reason is not None:
            text += generation.text.end()
        return _Step(token, text, logprobs, scalings, reason)

    def _told(self, generation: Generation, step: "_Step") -> Delta:
        """Tell what a token added; end the generation if it was its last."""
        reason, error = step.reason, None
        if reason is not None:
            reason, error = self._book.finish(generation, reason)
        return Delta(
            request_id=generation.state.request_id,
            index=generation.index,
            token_ids=(step.token,),
            text=step.text,
            logprobs=step.logprobs,
            finish_reason=reason,
            error=error,
            scalings=step.scalings,
        )

    def _finish_reason(self, generation: Generation, token: int) -> FinishReason | None:
        chooser = generation.chooser
        if chooser.constraint is not None and chooser.constraint.is_complete:
            return "stop"  # whatever min_tokens is: nothing can follow
        if generation.num_new >= chooser.sampling.min_tokens:
            is_end = token in chooser.end_tokens
            if is_end or generation.text.is_stopped:
                return "stop"
        return "length" if generation.num_new >= generation.state.max_new_tokens else None


class _Step(NamedTuple):
    """A token that was chosen, and what came with it."""

    token: int
    text: str
    logprobs: tuple[TokenLogprobs, ...]
    scalings: tuple[TokenScalings, ...]
    reason: FinishReason | None  # of the answer's end


def _keep_prompt_logprobs(result: PartResult) -> None:
    """What a chunk of the prompt tells about the token after each of its tokens."""
    part, generation = result.part, result.part.generation
    kept, num_top = generation.prompt_logprobs, generation.chooser.sampling.prompt_logprobs
    assert kept is not None, "logits of a prompt came that weren't asked for"
    assert num_top is not None, "a prompt's probabilities are kept though they aren't wanted"
    assert result.all_logits is not None, "a chunk of the prompt returned no logits"
    for logits, position in zip(result.all_logits, range(part.start + 1, part.stop + 1), strict=True):
        if position < len(kept):
            kept[position] = token_logprobs(logits, generation.tokens[position], num_top)
