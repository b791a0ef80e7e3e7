"""Generations without a model, and a scheduler over few blocks: who runs, with how many tokens, and what is held."""

from collections.abc import Collection, Sequence
from functools import partial
from types import SimpleNamespace

import torch

from loraplex.engine.config import EngineConfig
from loraplex.engine.kv.block_pool import BlockPool, BlockTable
from loraplex.engine.kv.sequence_kv import ExtraKey, LengthRule
from loraplex.engine.request import Request
from loraplex.engine.sampling.params import SamplingParams
from loraplex.engine.sched.chunk import ScheduledChunk
from loraplex.engine.sched.scheduler import Scheduler
from loraplex.engine.sched.sequence import RequestState, SequenceState

BLOCK = 4  # tokens


class Passes:
    """What a binding tells of a link: the identity of its main pass, and of each scaling pass."""

    attention_chain = ()
    interventions = None
    all_mixtures = ()

    def __init__(self, identity: str, scalings: Sequence[str]) -> None:
        self._identity = identity
        self.scaling_routes: tuple[tuple[()], ...] = tuple(() for _ in scalings)
        self.scaling_keys = tuple([ExtraKey(identity=(one,))] if one else [] for one in scalings)

    def main_routes(self, prompt: Sequence[int]) -> tuple[()]:
        return ()

    def main_keys(self, prompt: Sequence[int]) -> list[ExtraKey]:
        return [ExtraKey(identity=(self._identity,))] if self._identity else []


class Bench:
    """A scheduler, and passes that compute nothing: every part is done, and an answer's next token is its length."""

    def __init__(self, num_blocks: int = 64, **config: object) -> None:
        settings = {"max_step_tokens": 16, "max_running": 4, "fair_tokens": 16, "block_tokens": BLOCK} | config
        self.config = EngineConfig(**settings)
        self.pool = BlockPool(num_blocks, BLOCK)
        self.table = BlockTable(4, 64, torch.device("cpu"))
        self.missing: set[str] = set()  # adapters that are not in memory yet
        self.scheduler = Scheduler(self.config, self.pool, self.table, self._bring)
        self.tokens_read: list[list[int]] = []  # by the last pass's parts
        self._arrivals = 0

    def add(
        self,
        num_prompt: int,
        *,
        share: str = "",
        scalings: Sequence[str] = (),
        priority: int = 0,
        max_new: int = 100,
        first: int = 0,
    ) -> SequenceState:
        """A request of `num_prompt` tokens counted from `first`, for the adapter `share`."""
        prompt = tuple(range(first, first + num_prompt))
        sampling = SamplingParams(max_tokens=max_new)
        state = SimpleNamespace(
            request=Request(prompt, sampling=sampling, priority=priority),
            prompt=prompt,
            share=(share,),
            arrival=self._arrivals,
            max_new_tokens=max_new,
            binding=Passes(share, scalings),
            num_cached_tokens=0,
            lengths=LengthRule(),
            choosing=None,
            auto=None,
            images=None,
            arrived_s=0.0,
            queue_s=None,
        )
        state.note_cached = partial(RequestState.note_cached, state)
        self._arrivals += 1
        sequence = SequenceState(state, 0, SimpleNamespace(sampling=sampling), SimpleNamespace())
        self.scheduler.add(sequence)
        return sequence

    def step(self, guesses: Collection[int] | None = None) -> list[ScheduledChunk]:
        """Plan a pass and take it for done; a scaling pass guesses the next token right unless told otherwise."""
        chunks = self.scheduler.plan()
        self.tokens_read = [chunk.tokens for chunk in chunks]
        for chunk in chunks:
            chunk.kv.num_computed = chunk.stop
        for chunk in sorted(chunks, key=lambda chunk: chunk.scaling is None):
            sequence = chunk.sequence
            if chunk.scaling is not None:
                right = self.next_token(sequence, chunk.stop)
                guess = right if guesses is None else min(guesses)
                chunk.scaling.took(chunk.start, torch.zeros(chunk.count, 2), guess if chunk.wants_logits else None)
                chunk.kv.cache_full_blocks(len(sequence.tokens))
                continue
            for scaling in sequence.scalings:
                scaling.forget(chunk.stop)
            chunk.kv.cache_full_blocks(len(sequence.tokens))
            if chunk.wants_logits:
                self._answer(sequence)
        return chunks

    def finish(self, limit: int = 10_000) -> list[SequenceState]:
        """Step until nothing waits or runs; the sequences in the order in which they ended."""
        ended: list[SequenceState] = []
        for _ in range(limit):
            if not self.scheduler.running and not len(self.scheduler.waiting):
                return ended
            before = {*self.scheduler.running, *self.scheduler.waiting}
            self.step()
            after = {*self.scheduler.running, *self.scheduler.waiting}
            ended += sorted(before - after, key=lambda sequence: sequence.state.arrival)
        raise AssertionError(f"{len(self.scheduler.waiting)} sequences still wait")

    @staticmethod
    def next_token(sequence: SequenceState, length: int) -> int:
        return 1000 + length

    def _answer(self, sequence: SequenceState) -> None:
        sequence.tokens.append(self.next_token(sequence, len(sequence.tokens)))
        for scaling in sequence.scalings:
            scaling.settle()
        if sequence.num_new >= sequence.state.max_new_tokens:
            self.scheduler.remove(sequence)

    def _bring(self, sequence: SequenceState) -> bool:
        return sequence.state.share[0] not in self.missing


def main_tokens(chunks: Sequence[ScheduledChunk], sequence: SequenceState) -> int:
    """How many of its main pass's tokens are in a pass."""
    return sum(chunk.count for chunk in chunks if chunk.owner is sequence and chunk.scaling is None)
