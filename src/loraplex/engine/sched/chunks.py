"""Which tokens of a sequence's passes can run next."""

from loraplex.engine.sched.scaling_pass import SequenceScalingPass
from loraplex.engine.sched.sequence import SequenceState
from loraplex.engine.worker.input_batch import ScheduledChunk


class TokenBudget:
    """Tokens that a pass may still take."""

    def __init__(self, num_tokens: int) -> None:
        self.left = num_tokens

    def take(self, num_tokens: int) -> None:
        self.left = max(0, self.left - num_tokens)


class SchedulerOutput:
    """The parts of the next pass so far, and the blocks that they will take."""

    def __init__(self) -> None:
        self.parts: list[ScheduledChunk] = []
        self.sequences: set[SequenceState] = set()
        self.num_tokens = 0
        self.num_blocks = 0

    def add(self, sequence: SequenceState, parts: list[ScheduledChunk], num_blocks: int) -> None:
        self.parts += parts
        self.sequences.add(sequence)
        self.num_tokens += sum(part.count for part in parts)
        self.num_blocks += num_blocks


def is_decoding(sequence: SequenceState) -> bool:
    """Whether only its last token is left to run in every pass."""
    certain = len(sequence.tokens)
    return all(track.num_computed >= certain - 1 for track in sequence.tracks)


def decode_chunks(sequence: SequenceState, draft: bool) -> list[ScheduledChunk]:
    """The last token of the main pass, if its scalings are known; of the scaling passes, the last token or a draft."""
    certain = len(sequence.tokens)
    ready = all(scaling.track.num_computed >= certain for scaling in sequence.scalings)
    parts = [_main_chunk(sequence, certain - 1, certain)] if ready else []
    for scaling in sequence.scalings:
        computed = scaling.track.num_computed
        if computed < certain:
            parts.append(_scaling_chunk(sequence, scaling, computed, certain, draft))
        elif ready and draft and computed == certain and scaling.guess is not None and _goes_on(sequence):
            parts.append(_scaling_chunk(sequence, scaling, certain, certain + 1, draft))
    return parts


def prefill_chunks(sequence: SequenceState, budget: TokenBudget, draft: bool) -> list[ScheduledChunk]:
    """A chunk of each pass; the main one follows the scaling passes, which tell its gates."""
    left, certain = budget.left, len(sequence.tokens)
    assert sequence.main is not None, "a sequence runs without passes"
    parts = []
    known = min([certain, *(scaling.track.num_computed for scaling in sequence.scalings)])
    start = sequence.main.num_computed
    stop = min(known, start + left)
    if stop > start:
        parts.append(_main_chunk(sequence, start, stop))
        left -= stop - start
    for scaling in sequence.scalings:
        start = scaling.track.num_computed
        stop = min(certain, start + left)
        if stop > start:
            parts.append(_scaling_chunk(sequence, scaling, start, stop, draft))
            left -= stop - start
    return parts


def _goes_on(sequence: SequenceState) -> bool:
    """Whether another token can follow the one that is chosen next."""
    return sequence.num_new + 1 < sequence.state.max_new_tokens


def _main_chunk(sequence: SequenceState, start: int, stop: int) -> ScheduledChunk:
    assert sequence.main is not None, "a sequence runs without passes"
    return ScheduledChunk(
        owner=sequence,
        scaling=None,
        track=sequence.main,
        start=start,
        count=stop - start,
        wants_logits=stop == len(sequence.tokens),
        wants_all_logits=sequence.prompt_logprobs is not None and start + 1 < sequence.num_prompt,
    )


def _scaling_chunk(
    sequence: SequenceState, scaling: SequenceScalingPass, start: int, stop: int, draft: bool
) -> ScheduledChunk:
    return ScheduledChunk(
        owner=sequence,
        scaling=scaling,
        track=scaling.track,
        start=start,
        count=stop - start,
        wants_logits=draft and stop >= len(sequence.tokens),
    )
