"""From the results of a pass to the generations' next tokens."""

from collections.abc import Sequence

from loraplex.engine.generation import Generation
from loraplex.engine.intake import Intake
from loraplex.engine.request import Delta, FinishReason, TokenLogprobs
from loraplex.engine.request_book import RequestBook
from loraplex.engine.runner import PartResult
from loraplex.engine.stats import StepCounts
from loraplex.engine.token_choice import token_logprobs
from loraplex.errors import LoraplexError


class Answers:
    """Chooses tokens, tells what is new, and ends answers that are complete."""

    def __init__(self, intake: Intake, book: RequestBook, counts: StepCounts) -> None:
        self._intake = intake
        self._book = book
        self._counts = counts

    def take(self, results: Sequence[PartResult]) -> list[Delta]:
        """Use what a pass gave; scaling passes first, whose results the next main passes need."""
        for result in results:
            self._keep_scalings(result)
        deltas = []
        for result in results:
            part = result.part
            if part.scaling is not None:
                continue
            if result.error is not None:
                deltas.append(self._book.end(part.generation, "error", result.error))
                continue
            if part.generation.observations is not None:
                part.generation.observations.saw(part.start, part.stop, result.scalings)
            if result.all_logits is not None:
                _keep_prompt_logprobs(result)
            part.track.name_blocks(len(part.track.tokens))
            if part.wants_logits:
                try:
                    deltas.append(self._next_token(part.generation, result))
                except LoraplexError as error:
                    deltas.append(self._book.end(part.generation, "error", error))
        return deltas

    def _keep_scalings(self, result: PartResult) -> None:
        """Hand a scaling pass's results on; drop those that the main pass has used."""
        part = result.part
        if part.scaling is None:
            for scaling in part.generation.scalings:
                scaling.forget(part.stop)
            return
        assert result.hidden is not None, "a scaling pass returned no hidden states"
        part.scaling.took(part.start, result.hidden, result.best)
        part.track.name_blocks(len(part.track.tokens))

    def _next_token(self, generation: Generation, result: PartResult) -> Delta:
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
        reason, error = self._finish_reason(generation, token), None
        if reason is not None:
            text += generation.text.end()
            reason, error = self._book.finish(generation, reason)
        return Delta(
            request_id=generation.state.request_id,
            index=generation.index,
            token_ids=(token,),
            text=text,
            logprobs=logprobs,
            finish_reason=reason,
            error=error,
            scalings=scalings,
        )

    def _finish_reason(self, generation: Generation, token: int) -> FinishReason | None:
        chooser = generation.chooser
        if generation.num_new >= chooser.sampling.min_tokens:
            is_end = token in chooser.end_tokens
            is_complete = chooser.constraint is not None and chooser.constraint.is_complete
            if is_end or is_complete or generation.text.is_stopped:
                return "stop"
        return "length" if generation.num_new >= generation.state.max_new_tokens else None


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
