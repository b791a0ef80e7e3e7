"""Which tokens of a generation's passes can run next."""

from loraplex.engine.sched.scaling_pass import ScalingPass
from loraplex.engine.sched.sequence import Generation
from loraplex.engine.worker.input_batch import Part


class TokenBudget:
    """Tokens that a pass may still take."""

    def __init__(self, num_tokens: int) -> None:
        self.left = num_tokens

    def take(self, num_tokens: int) -> None:
        self.left = max(0, self.left - num_tokens)


class PassPlan:
    """The parts of the next pass so far, and the blocks that they will take."""

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self.generations: set[Generation] = set()
        self.num_tokens = 0
        self.num_blocks = 0

    def add(self, generation: Generation, parts: list[Part], num_blocks: int) -> None:
        self.parts += parts
        self.generations.add(generation)
        self.num_tokens += sum(part.count for part in parts)
        self.num_blocks += num_blocks


def is_decoding(generation: Generation) -> bool:
    """Whether only its last token is left to run in every pass."""
    certain = len(generation.tokens)
    return all(track.num_computed >= certain - 1 for track in generation.tracks)


def decode_parts(generation: Generation, draft: bool) -> list[Part]:
    """The last token of the main pass, if its scalings are known; of the scaling passes, the last token or a draft."""
    certain = len(generation.tokens)
    ready = all(scaling.track.num_computed >= certain for scaling in generation.scalings)
    parts = [_main_part(generation, certain - 1, certain)] if ready else []
    for scaling in generation.scalings:
        computed = scaling.track.num_computed
        if computed < certain:
            parts.append(_scaling_part(generation, scaling, computed, certain, draft))
        elif ready and draft and computed == certain and scaling.guess is not None and _goes_on(generation):
            parts.append(_scaling_part(generation, scaling, certain, certain + 1, draft))
    return parts


def prompt_parts(generation: Generation, budget: TokenBudget, draft: bool) -> list[Part]:
    """A chunk of each pass; the main one follows the scaling passes, which tell its gates."""
    left, certain = budget.left, len(generation.tokens)
    assert generation.main is not None, "a generation runs without passes"
    parts = []
    known = min([certain, *(scaling.track.num_computed for scaling in generation.scalings)])
    start = generation.main.num_computed
    stop = min(known, start + left)
    if stop > start:
        parts.append(_main_part(generation, start, stop))
        left -= stop - start
    for scaling in generation.scalings:
        start = scaling.track.num_computed
        stop = min(certain, start + left)
        if stop > start:
            parts.append(_scaling_part(generation, scaling, start, stop, draft))
            left -= stop - start
    return parts


def _goes_on(generation: Generation) -> bool:
    """Whether another token can follow the one that is chosen next."""
    return generation.num_new + 1 < generation.state.max_new_tokens


def _main_part(generation: Generation, start: int, stop: int) -> Part:
    assert generation.main is not None, "a generation runs without passes"
    return Part(
        owner=generation,
        scaling=None,
        track=generation.main,
        start=start,
        count=stop - start,
        wants_logits=stop == len(generation.tokens),
        wants_all_logits=generation.prompt_logprobs is not None and start + 1 < generation.num_prompt,
    )


def _scaling_part(generation: Generation, scaling: ScalingPass, start: int, stop: int, draft: bool) -> Part:
    return Part(
        owner=generation,
        scaling=scaling,
        track=scaling.track,
        start=start,
        count=stop - start,
        wants_logits=draft and stop >= len(generation.tokens),
    )
