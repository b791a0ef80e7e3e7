"""Who runs in the next forward pass, and with how many tokens."""

import time
from collections.abc import Callable
from typing import Literal

from loraplex.engine.config import EngineConfig
from loraplex.engine.durations import Durations
from loraplex.engine.faults import own_fault
from loraplex.engine.kv.block_pool import BlockPool, BlockTable
from loraplex.engine.kv.sequence_kv import SequenceKV
from loraplex.engine.sched.chunk import ScheduledChunk
from loraplex.engine.sched.request_queue import FairShares, RequestQueue
from loraplex.engine.sched.scaling_pass import SequenceScalingPass
from loraplex.engine.sched.sequence import SequenceState
from loraplex.errors import LoraplexError


class TokenBudget:
    """Tokens that a pass may still take."""

    def __init__(self, num_tokens: int) -> None:
        self.left = num_tokens

    def take(self, num_tokens: int) -> None:
        self.left = max(0, self.left - num_tokens)


class SchedulerOutput:
    """The parts of the next pass so far, and the blocks that they will take."""

    def __init__(self) -> None:
        self.chunks: list[ScheduledChunk] = []
        self.sequences: set[SequenceState] = set()
        self.num_tokens = 0
        self.num_blocks = 0

    def add(self, sequence: SequenceState, chunks: list[ScheduledChunk], num_blocks: int) -> None:
        self.chunks += chunks
        self.sequences.add(sequence)
        self.num_tokens += sum(chunk.count for chunk in chunks)
        self.num_blocks += num_blocks


def is_decoding(sequence: SequenceState) -> bool:
    """Whether only its last token is left to run in every pass."""
    certain = len(sequence.tokens)
    return all(kv.num_computed >= certain - 1 for kv in sequence.kvs)


def decode_chunks(sequence: SequenceState, draft: bool) -> list[ScheduledChunk]:
    """The last token of the main pass, if its scalings are known; of the scaling passes, the last token or a draft."""
    certain = len(sequence.tokens)
    ready = all(scaling.kv.num_computed >= certain for scaling in sequence.scalings)
    chunks = [_main_chunk(sequence, certain - 1, certain)] if ready else []
    for scaling in sequence.scalings:
        computed = scaling.kv.num_computed
        if computed < certain:
            chunks.append(_scaling_chunk(sequence, scaling, computed, certain, draft))
        elif ready and draft and computed == certain and scaling.guess is not None and _goes_on(sequence):
            chunks.append(_scaling_chunk(sequence, scaling, certain, certain + 1, draft))
    return chunks


def prefill_chunks(sequence: SequenceState, budget: TokenBudget, draft: bool) -> list[ScheduledChunk]:
    """A chunk of each pass; the main one follows the scaling passes, which tell its gates."""
    left, certain = budget.left, len(sequence.tokens)
    assert sequence.main is not None, "a sequence runs without passes"
    chunks = []
    known = min([certain, *(scaling.kv.num_computed for scaling in sequence.scalings)])
    start = sequence.main.num_computed
    stop = min(known, start + left)
    if stop > start:
        chunks.append(_main_chunk(sequence, start, stop))
        left -= stop - start
    for scaling in sequence.scalings:
        start = scaling.kv.num_computed
        stop = min(certain, start + left)
        if stop > start:
            chunks.append(_scaling_chunk(sequence, scaling, start, stop, draft))
            left -= stop - start
    return chunks


def _goes_on(sequence: SequenceState) -> bool:
    """Whether another token can follow the one that is chosen next."""
    return sequence.num_new + 1 < sequence.state.max_new_tokens


def _main_chunk(sequence: SequenceState, start: int, stop: int) -> ScheduledChunk:
    assert sequence.main is not None, "a sequence runs without passes"
    return ScheduledChunk(
        owner=sequence,
        scaling=None,
        kv=sequence.main,
        start=start,
        count=stop - start,
        wants_logits=stop == len(sequence.tokens) and sequence.hidden is None and not sequence.chooses,
        is_pooled=sequence.hidden is not None,
        wants_all_logits=sequence.prompt_logprobs is not None and start + 1 < sequence.num_prompt,
    )


def _scaling_chunk(
    sequence: SequenceState, scaling: SequenceScalingPass, start: int, stop: int, draft: bool
) -> ScheduledChunk:
    return ScheduledChunk(
        owner=sequence,
        scaling=scaling,
        kv=scaling.kv,
        start=start,
        count=stop - start,
        wants_logits=draft and stop >= len(sequence.tokens),
    )


# Says whether a sequence's adapters are in slots now: if not, ask again later.
BringAdapters = Callable[[SequenceState], bool]


class Scheduler:
    """Keeps the waiting and the running sequences, and the memory for their keys and values.

    A running sequence that gives way keeps its keys and values as long as there is room; when they have to go, they
    stay in the prefix cache until they are overwritten, and its tokens are never lost.
    """

    def __init__(self, config: EngineConfig, pool: BlockPool, table: BlockTable, bring: BringAdapters) -> None:
        self._config = config
        self._pool = pool
        self._table = table
        self._bring = bring
        self.shares = FairShares()
        self.waiting = RequestQueue(self.shares)
        self.running: list[SequenceState] = []
        self.failures: list[tuple[SequenceState, LoraplexError]] = []  # of those that can't begin
        self.num_preempted = 0
        self.queue_times = Durations()  # until requests ran

    def add(self, sequence: SequenceState) -> None:
        self.shares.enter(sequence.state.share)
        self.waiting.add(sequence)

    def remove(self, sequence: SequenceState) -> None:
        """Forget a sequence that ended or was cancelled, and free what it held."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        sequence.drop_passes()
        self.shares.leave(sequence.state.share)

    def plan(self) -> list[ScheduledChunk]:
        """The parts of the next pass: a token of every answer, then prompts as far as the budget goes."""
        for sequence in [sequence for sequence in self.running if sequence.is_outgrown]:
            self._evict(sequence)
        self._make_way()
        self._admit()
        ranked = sorted(self.running, key=self._order)
        plan = SchedulerOutput()
        for sequence in ranked:
            if sequence.holds_blocks and is_decoding(sequence):
                self._place(plan, sequence, decode_chunks(sequence, self._config.draft))
        # However many answers there are, prompts get on by a block.
        assert self._config.max_step_tokens is not None, "a start chooses it"
        budget = TokenBudget(max(self._config.max_step_tokens - plan.num_tokens, self._config.block_tokens))
        for sequence in ranked:
            if sequence.holds_blocks and not is_decoding(sequence):
                budget.take(self._place(plan, sequence, prefill_chunks(sequence, budget, self._config.draft)))
        for chunk in plan.chunks:
            chunk.kv.grow(chunk.stop)
            self.shares.charge(chunk.sequence.state.share, chunk.count)
        return plan.chunks

    # Room for keys and values

    def _place(self, plan: SchedulerOutput, sequence: SequenceState, wanted: list[ScheduledChunk]) -> int:
        """Plan `wanted` if there are blocks for it, made free if need be; returns the number of its tokens."""
        needed = sum(chunk.kv.blocks_missing(chunk.stop) for chunk in wanted)
        while wanted and plan.num_blocks + needed > self._pool.num_available:
            victim = self._victim(sequence, plan)
            if victim is None:
                return 0
            self._evict(victim)
        plan.add(sequence, wanted, needed)
        return sum(chunk.count for chunk in wanted)

    def _victim(self, sequence: SequenceState, plan: SchedulerOutput) -> SequenceState | None:
        """Who loses its keys and values: paused ones first, then running ones that rank behind `sequence`."""
        paused = [waiting for waiting in self.waiting if waiting.holds_blocks]
        if paused:
            return max(paused, key=self._order)
        order = self._order(sequence)
        behind = [r for r in self.running if r not in plan.sequences and self._order(r) > order]
        return max(behind, key=self._order) if behind else None

    def _evict(self, victim: SequenceState) -> None:
        victim.drop_passes()
        if victim in self.running:
            self.running.remove(victim)
            self.waiting.put_back(victim)
        self.num_preempted += 1

    # Who runs

    def _order(self, sequence: SequenceState) -> tuple[int, float, int, int]:
        """Sorts by priority, then by how little its share got, then by arrival. No two are equal: one must give way."""
        state = sequence.state
        return -state.request.priority, self.shares.served(state.share), state.arrival, sequence.index

    def _make_way(self) -> None:
        """Pause running sequences for waiting ones of higher priority, or whose share is too far behind."""
        if len(self.running) < self._config.max_running:
            return
        for candidate in self.waiting.heads():
            last = max(self.running, key=self._order, default=None)
            if last is None or not self._goes_before(candidate, last):
                return
            self.running.remove(last)
            self.waiting.put_back(last)
            self.num_preempted += 1

    def _goes_before(self, candidate: SequenceState, other: SequenceState) -> bool:
        first, second = self._order(candidate), self._order(other)
        return first[0] < second[0] or (first[0] == second[0] and first[1] + self._config.fair_tokens < second[1])

    def _admit(self) -> None:
        """Let waiting sequences run while there is room for them; who is first but too large lets no one pass."""
        refused: set[SequenceState] = set()
        while len(self.running) < self._config.max_running:
            for head in self.waiting.heads():
                if head in refused:
                    continue
                outcome = self._try(head)
                while outcome == "no room" and self._evict_paused_behind(head):
                    outcome = self._try(head)
                if outcome == "no room" and self.running:
                    return
                if outcome == "runs":
                    break
                refused.add(head)
            else:
                return

    def _evict_paused_behind(self, sequence: SequenceState) -> bool:
        """Take the blocks of a paused sequence that ranks behind this one; False if there is none."""
        order = self._order(sequence)
        paused = [waiting for waiting in self.waiting if waiting.holds_blocks and self._order(waiting) > order]
        if paused:
            self._evict(max(paused, key=self._order))
        return bool(paused)

    def _try(self, sequence: SequenceState) -> Literal["runs", "later", "no room"]:
        if not self._bring(sequence):
            return "later"
        if not sequence.holds_blocks:
            binding = sequence.state.binding
            assert binding is not None, "a sequence begins without its adapters"
            try:
                passes = sequence.passes(binding)
            except Exception as error:
                self.failures.append((sequence, own_fault(error, "beginning the answer")))
                return "later"
            if not self._table.has_rows(len(passes)):
                return "no room"
            sequence.begin(passes, self._pool, self._table, reuse=self._config.prefix_cache)
            has_room = self._has_room(sequence)
            if not has_room or (self._config.prefix_cache and self._is_computed_now(sequence)):
                sequence.drop_passes()
                return "later" if has_room else "no room"
            sequence.state.note_cached(_main(sequence).num_computed)
        if sequence.state.queue_s is None:
            sequence.state.queue_s = time.perf_counter() - sequence.state.arrived_s
            self.queue_times.add(sequence.state.queue_s)
        self.waiting.remove(sequence)
        self.running.append(sequence)
        return "runs"

    def _has_room(self, sequence: SequenceState) -> bool:
        """Whether its tokens fit now, beside a block for the next tokens of every running one."""
        needed = sum(kv.blocks_missing(len(sequence.tokens) + 1) for kv in sequence.kvs)
        promised = sum(kv.blocks_missing(len(running.tokens) + 1) for running in self.running for kv in running.kvs)
        return needed + promised <= self._pool.num_available

    def _is_computed_now(self, sequence: SequenceState) -> bool:
        """Whether a running sequence is about to compute the next block of this one's prompt: worth waiting for."""
        size = self._config.block_tokens
        number = len(_main(sequence).blocks)
        keys = _main(sequence).keys(len(sequence.tokens) - 1)
        if number >= len(keys) or (number + 1) * size > sequence.most_reused:
            return False
        for running in self.running:
            main = _main(running)
            known = main.keys(len(running.tokens))
            if main.num_computed < (number + 1) * size and number < len(known) and known[number] == keys[number]:
                return True
        return False


def _main(sequence: SequenceState) -> SequenceKV:
    assert sequence.main is not None, "a sequence without passes was taken for a running one"
    return sequence.main
