"""The scheduler by itself: budgets, chunks, drafts, room, giving way, fair shares."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from loraplex.engine.sched.chunk import ScheduledChunk
from tests.engine.scheduled import BLOCK, Bench, main_tokens

LONGEST = 40  # tokens of prompt and answer
KINDS = (("", ()), ("a", ()), ("b", ()), ("mixture", ("",)), ("two mixtures", ("", "at 0.5")))


class SchedulerMachine(RuleBasedStateMachine):
    """Requests of all kinds come, are cancelled, and wait for their adapters, over few blocks."""

    @initialize(
        extra=st.integers(0, 20),
        max_running=st.integers(1, 5),
        max_step_tokens=st.integers(1, 30),
        draft=st.booleans(),
        prefix_cache=st.booleans(),
    )
    def begin(self, extra: int, **config: object) -> None:
        largest = 3 * -(-(LONGEST + 1) // BLOCK)  # of a main and two scaling passes
        self.bench = Bench(largest + extra, **config)
        self.asked: list[tuple[object, int, int]] = []
        self.cancelled: set[object] = set()

    @rule(
        kind=st.sampled_from(KINDS),
        num_prompt=st.integers(1, 25),
        max_new=st.integers(1, LONGEST - 25),
        priority=st.integers(0, 1),
        first=st.sampled_from((0, 0, 50)),
    )
    def add(self, kind: tuple[str, tuple[str, ...]], num_prompt: int, max_new: int, priority: int, first: int) -> None:
        share, scalings = kind
        sequence = self.bench.add(
            num_prompt, share=share, scalings=scalings, priority=priority, max_new=max_new, first=first
        )
        self.asked.append((sequence, num_prompt, max_new))

    def unfinished(self) -> list:
        return [*self.bench.scheduler.running, *self.bench.scheduler.waiting]

    @precondition(lambda self: self.unfinished())
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        number = data.draw(st.integers(0, len(self.unfinished()) - 1))
        sequence = self.unfinished()[number]
        self.bench.scheduler.remove(sequence)
        self.cancelled.add(sequence)
        assert sequence not in self.unfinished()

    @rule(missing=st.sets(st.sampled_from(["a", "mixture"])))
    def adapters_come_and_go(self, missing: set[str]) -> None:
        self.bench.missing = missing

    @rule(guesses=st.sampled_from((None, None, (7,))))
    def step(self, guesses: tuple[int, ...] | None) -> None:
        before = {kv: kv.num_computed for sequence in self.unfinished() for kv in sequence.kvs}
        runnable = [g for g in self.unfinished() if g.state.share[0] not in self.bench.missing]
        parts = self.bench.step(guesses)
        if runnable:
            assert parts, "there is work and nothing runs"
        self.check_budget(parts)
        self.check_order_of_passes(parts, before)

    def check_budget(self, parts: list[ScheduledChunk]) -> None:
        chunks = [part for part in parts if is_chunk(part)]
        num_decoded = sum(part.count for part in parts) - sum(part.count for part in chunks)
        allowed = max(self.bench.config.max_step_tokens - num_decoded, BLOCK)
        # The last token of a prompt may be read by itself, and then isn't told from a decoded one.
        assert sum(part.count for part in chunks) <= allowed
        assert len({part.kv for part in parts}) == len(parts), "a pass has two parts of one track"

    def check_order_of_passes(self, parts: list[ScheduledChunk], before: dict) -> None:
        for part in parts:
            assert part.start == before.get(part.kv, part.start), "tokens were left out or run twice"
            assert part.count > 0
            for scaling in part.sequence.scalings if part.scaling is None else ():
                assert part.stop <= before.get(scaling.kv, part.stop), "the main pass ran before its gates were known"

    @invariant()
    def nobody_is_lost_or_twice_there(self) -> None:
        unfinished = self.unfinished()
        assert len(unfinished) == len(set(unfinished))
        assert len(self.bench.scheduler.waiting) == len(list(self.bench.scheduler.waiting))
        ended = [g for g, _, max_new in self.asked if g.num_new == max_new or g in self.cancelled]
        assert {g for g, _, _ in self.asked} == {*unfinished, *ended}

    @invariant()
    def no_more_run_than_may(self) -> None:
        assert len(self.bench.scheduler.running) <= self.bench.config.max_running

    @invariant()
    def what_is_held_is_what_tracks_hold(self) -> None:
        kvs = [kv for sequence in self.unfinished() for kv in sequence.kvs]
        blocks = [block for kv in kvs for block in kv.blocks]
        assert self.bench.pool.num_held == len(set(blocks))
        assert self.bench.table.num_rows_held == len(kvs) == len({kv.row for kv in kvs})
        for kv in kvs:
            assert len(set(kv.blocks)) == len(kv.blocks)
            assert kv.num_computed <= len(kv.blocks) * BLOCK
            assert self.bench.table.values[kv.row, : len(kv.blocks)].tolist() == kv.blocks

    @invariant()
    def who_writes_a_block_holds_it_alone(self) -> None:
        kvs = [kv for sequence in self.unfinished() for kv in sequence.kvs]
        being_written = [block for kv in kvs for block in kv.blocks[kv.num_computed // BLOCK :]]
        all_blocks = [block for kv in kvs for block in kv.blocks]
        assert all(all_blocks.count(block) == 1 for block in being_written)

    def teardown(self) -> None:
        if not hasattr(self, "bench"):
            return
        self.bench.missing = set()
        self.bench.finish()
        assert (self.bench.pool.num_held, self.bench.table.num_rows_held) == (0, 0)
        for sequence, num_prompt, max_new in self.asked:
            if sequence not in self.cancelled:
                answer = list(range(1000 + num_prompt, 1000 + num_prompt + max_new))
                assert sequence.new_tokens == answer, "tokens were lost or made twice"


def is_chunk(part: ScheduledChunk) -> bool:
    return part.stop < part.sequence.num_prompt or part.count > 1


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)


# Budgets and chunks


def test_a_long_prompt_is_read_in_chunks_of_the_budget():
    bench = Bench(max_step_tokens=16)
    sequence = bench.add(50, max_new=1)
    assert [main_tokens(bench.step(), sequence) for _ in range(4)] == [16, 16, 16, 2]
    assert not bench.scheduler.running


def test_answers_come_first_and_prompts_get_what_is_left():
    bench = Bench(max_step_tokens=8)
    answering = [bench.add(2), bench.add(2, first=50)]
    bench.step()
    reading = bench.add(30, first=100)
    parts = bench.step()
    assert [main_tokens(parts, sequence) for sequence in answering] == [1, 1]
    assert main_tokens(parts, reading) == 6


def test_prompts_get_on_by_a_block_however_many_answers_there_are():
    bench = Bench(max_step_tokens=2, max_running=4)
    answering = [bench.add(1, first=10 * i) for i in range(3)]
    for _ in range(3):
        bench.step()
    reading = bench.add(30, first=100)
    parts = bench.step()
    assert all(main_tokens(parts, sequence) == 1 for sequence in answering)
    assert main_tokens(parts, reading) == BLOCK


def test_two_prompts_share_one_budget():
    bench = Bench(max_step_tokens=16)
    first, second = bench.add(10), bench.add(30, first=100)
    parts = bench.step()
    assert (main_tokens(parts, first), main_tokens(parts, second)) == (10, 6)
    assert [part.wants_logits for part in parts] == [True, False]


# Scaling passes and drafts


def test_a_scaling_pass_is_a_chunk_ahead_of_its_main_pass():
    bench = Bench(max_step_tokens=16, draft=False)
    sequence = bench.add(20, scalings=["base"], max_new=2)
    seen = []
    while bench.scheduler.running or not seen:
        parts = bench.step()
        seen.append({part.scaling is None: (part.start, part.stop) for part in parts})
    assert seen[0] == {False: (0, 16)}
    assert seen[1] == {True: (0, 16)}
    assert seen[2] == {False: (16, 20)}
    assert seen[3] == {True: (16, 20)}
    assert seen[4:] == [{False: (20, 21)}, {True: (20, 21)}]
    assert sequence.num_new == 2


def test_with_right_drafts_every_step_gives_a_token():
    bench = Bench()
    sequence = bench.add(4, scalings=["base"], max_new=8)
    for _ in range(3):  # the prompt's scaling pass, its main pass, the first token's scaling pass
        bench.step()
    for num_new in range(2, 8):
        assert {(part.scaling is None, part.count) for part in bench.step()} >= {(True, 1)}
        assert sequence.num_new == num_new


def test_a_wrong_draft_costs_a_pass_and_its_result_is_thrown_away():
    bench = Bench()
    sequence = bench.add(4, scalings=["base"], max_new=6)
    read: list[list[int]] = []
    while sequence.num_new < 6:
        parts = bench.step(guesses=(7,))
        read += [tokens for part, tokens in zip(parts, bench.tokens_read, strict=True) if part.scaling is not None]
    assert sequence.new_tokens == [1004 + i for i in range(6)]
    assert [7] in read, "no draft ran"
    certain = [tokens for tokens in read if tokens != [7]]
    assert certain == [[0, 1, 2, 3], *([1004 + i] for i in range(5))], "a token's own scaling pass was left out"


def test_the_last_token_of_an_answer_is_not_drafted_beyond():
    bench = Bench()
    sequence = bench.add(4, scalings=["base"], max_new=3)
    furthest = 0
    while sequence.num_new < 3:
        furthest = max([furthest, *(part.stop for part in bench.step() if part.scaling is not None)])
    assert furthest == 4 + 3 - 1, "a scaling pass ran for a token whose main pass never runs"


# Room


def test_who_ranks_last_loses_its_blocks_and_comes_back_to_the_same_answer():
    bench = Bench(num_blocks=6, fair_tokens=1000)
    sequences = [bench.add(8, first=100 * i, max_new=10) for i in range(2)]
    ended = bench.finish()
    assert bench.scheduler.num_preempted > 0
    assert ended == sequences, "the later one gives way"
    assert all(sequence.new_tokens == list(range(1008, 1018)) for sequence in ended)


def test_of_what_a_preempted_generation_computed_the_end_goes_first_and_the_rest_is_found_again():
    bench = Bench(num_blocks=8, max_running=1, max_step_tokens=32)
    low = bench.add(12, max_new=4)
    bench.step()
    urgent = bench.add(20, first=100, priority=1, max_new=2)  # six of the eight blocks, three of which low had
    bench.step()
    assert low in bench.scheduler.waiting
    assert not low.holds_blocks
    bench.step()
    assert urgent.num_new == 2
    (part,) = bench.step()
    assert (part.owner, part.start, part.stop) == (low, 8, 13)
    assert bench.finish() == [low]
    assert low.new_tokens == list(range(1012, 1016))


def test_a_first_one_that_does_not_fit_lets_no_one_pass():
    bench = Bench(num_blocks=8, max_running=3)
    running = bench.add(20, max_new=8)
    bench.step()
    large, small = bench.add(24, first=100, max_new=4), bench.add(1, first=200, max_new=1)
    while running.num_new < 8:
        bench.step()
        assert set(bench.scheduler.running) <= {running}, "one that came later took the room that the first waits for"
    bench.step()
    assert bench.scheduler.running[0] == large
    assert (small.num_new, bench.finish()) == (1, [large])


def test_one_that_waits_for_its_adapter_does_not_hold_up_others():
    bench = Bench()
    bench.missing = {"slow"}
    slow, other = bench.add(4, share="slow", max_new=2), bench.add(4, first=50, max_new=2)
    bench.step()
    assert bench.scheduler.running == [other]
    assert slow in bench.scheduler.waiting
    bench.missing = set()
    assert set(bench.finish()) == {slow, other}


def test_a_cancelled_one_frees_what_it_held_wherever_it_is():
    bench = Bench(max_running=1)
    running, waiting = bench.add(10, max_new=5), bench.add(10, first=50, max_new=5)
    bench.step()
    assert bench.pool.num_held > 0
    bench.scheduler.remove(running)
    bench.scheduler.remove(waiting)
    assert (bench.pool.num_held, bench.table.num_rows_held) == (0, 0)
    assert bench.step() == []


# Who goes first


def test_higher_priority_takes_a_place_and_gives_it_back():
    bench = Bench(max_running=1)
    low = bench.add(4, max_new=6)
    bench.step()
    high = bench.add(4, first=50, priority=1, max_new=3)
    parts = bench.step()
    assert main_tokens(parts, high) == 4
    assert main_tokens(parts, low) == 0
    assert low.holds_blocks, "there is room, so the paused one keeps its keys and values"
    assert bench.finish() == [high, low]


def test_equal_priority_takes_no_place_before_its_share_is_behind():
    bench = Bench(max_running=1, fair_tokens=8)
    first = bench.add(4, share="a", max_new=30)
    bench.step()
    second = bench.add(4, share="b", first=50, max_new=1)
    lead = bench.scheduler.shares.served(("a",)) - bench.scheduler.shares.served(("b",))
    assert lead == 0, "a new share starts where the least served one stands"
    steps = 0
    while second.num_new == 0:
        bench.step()
        steps += 1
    assert steps == 8 + 2, "it goes first once the other is 8 tokens ahead, and no sooner"
    assert first.num_new > 0


def test_shares_that_compete_get_equal_tokens():
    bench = Bench(max_running=2, fair_tokens=4, num_blocks=200)
    for i in range(10):
        bench.add(2, share="many", first=10 * i, max_new=20)
    few = [bench.add(2, share="few", first=500 + 10 * i, max_new=20) for i in range(2)]
    bench.step()
    got = {("many",): 0, ("few",): 0}
    while any(sequence.num_new < 20 for sequence in few):
        for part in bench.step():
            got[part.sequence.state.share] += part.count
    assert abs(got["many",] - got["few",]) <= 4 + 2 * 3, got


def test_within_a_share_the_first_to_come_is_the_first_to_go():
    bench = Bench(max_running=1)
    sequences = [bench.add(3, share="a", first=10 * i, max_new=4) for i in range(5)]
    assert bench.finish() == sequences
