"""Who waits in which order, and what each share of requests has got."""

from types import SimpleNamespace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from loraplex.engine.sched.request_queue import FairShares, RequestQueue

A, B, C = ("a",), ("b",), ("c",)


class One:
    """A sequence, as far as a queue looks at it."""

    def __init__(self, share: tuple[str, ...] = A, priority: int = 0) -> None:
        self.state = SimpleNamespace(request=SimpleNamespace(priority=priority), share=share)


class QueueMachine(RuleBasedStateMachine):
    """Requests that come, run, pause and end, against plain lists and sums."""

    @initialize()
    def begin(self) -> None:
        self.shares = FairShares()
        self.waiting = RequestQueue(self.shares)
        self.queues: dict[tuple[int, tuple[str, ...]], list] = {}
        self.running: list = []
        self.served: dict[tuple[str, ...], float] = {}

    def everyone(self) -> list:
        return [*self.running, *(one for queue in self.queues.values() for one in queue)]

    @rule(share=st.sampled_from((A, B, C)), priority=st.integers(0, 2))
    def add(self, share: tuple[str, ...], priority: int) -> None:
        one = One(share, priority)
        self.served.setdefault(share, min(self.served.values(), default=0))
        self.shares.enter(share)
        self.waiting.add(one)
        self.queues.setdefault((priority, share), []).append(one)

    @precondition(lambda self: self.queues)
    @rule(number=st.integers(0, 8))
    def run_a_head(self, number: int) -> None:
        heads = self.waiting.heads()
        one = heads[number % len(heads)]
        self.waiting.remove(one)
        self.take_out(one)
        self.running.append(one)

    @precondition(lambda self: self.running)
    @rule(number=st.integers(0, 8))
    def pause(self, number: int) -> None:
        one = self.running.pop(number % len(self.running))
        self.waiting.put_back(one)
        self.queues.setdefault((one.state.request.priority, one.state.share), []).insert(0, one)

    @precondition(lambda self: self.everyone())
    @rule(number=st.integers(0, 30))
    def end(self, number: int) -> None:
        one = self.everyone()[number % len(self.everyone())]
        if one in self.running:
            self.running.remove(one)
        else:
            self.waiting.remove(one)
            self.take_out(one)
        self.shares.leave(one.state.share)
        if not any(other.state.share == one.state.share for other in self.everyone()):
            del self.served[one.state.share]

    @rule(share=st.sampled_from((A, B, C)), num_tokens=st.integers(0, 50))
    def charge(self, share: tuple[str, ...], num_tokens: int) -> None:
        self.shares.charge(share, num_tokens)
        if share in self.served:
            self.served[share] += num_tokens

    def take_out(self, one: One) -> None:
        key = one.state.request.priority, one.state.share
        self.queues[key].remove(one)
        if not self.queues[key]:
            del self.queues[key]

    @invariant()
    def everyone_who_waits_is_there_once(self) -> None:
        expected = [one for queue in self.queues.values() for one in queue]
        assert len(self.waiting) == len(expected)
        assert sorted(map(id, self.waiting)) == sorted(map(id, expected))

    @invariant()
    def heads_are_the_first_of_each_queue_in_order(self) -> None:
        heads = self.waiting.heads()
        assert sorted(map(id, heads)) == sorted(id(queue[0]) for queue in self.queues.values())
        ranks = [(-one.state.request.priority, self.served[one.state.share]) for one in heads]
        assert ranks == sorted(ranks)

    @invariant()
    def shares_have_what_they_were_charged(self) -> None:
        for share in (A, B, C):
            assert self.shares.served(share) == self.served.get(share, 0)


TestQueue = QueueMachine.TestCase
TestQueue.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)


def test_within_a_queue_the_first_to_come_is_the_head():
    waiting = RequestQueue(FairShares())
    first, second = One(), One()
    waiting.add(first)
    waiting.add(second)
    assert waiting.heads() == [first]
    waiting.remove(first)
    assert waiting.heads() == [second]


def test_who_is_put_back_goes_before_those_that_never_ran():
    waiting = RequestQueue(FairShares())
    new, paused = One(), One()
    waiting.add(new)
    waiting.put_back(paused)
    assert waiting.heads() == [paused]
    assert len(waiting) == 2


def test_priority_comes_before_shares():
    shares = FairShares()
    for share in (A, B):
        shares.enter(share)
    shares.charge(A, 1000)
    waiting = RequestQueue(shares)
    urgent, other = One(A, priority=1), One(B)
    waiting.add(other)
    waiting.add(urgent)
    assert waiting.heads() == [urgent, other]


def test_the_share_that_got_least_comes_first():
    shares = FairShares()
    for share in (A, B, C):
        shares.enter(share)
    for share, num_tokens in ((A, 30), (B, 10), (C, 20)):
        shares.charge(share, num_tokens)
    waiting = RequestQueue(shares)
    for share in (A, B, C):
        waiting.add(One(share))
    assert [one.state.share for one in waiting.heads()] == [B, C, A]
    shares.charge(B, 100)
    assert waiting.heads()[-1].state.share == B


def test_one_that_does_not_wait_can_not_be_removed():
    waiting = RequestQueue(FairShares())
    waiting.add(One())
    with pytest.raises((ValueError, KeyError)):
        waiting.remove(One())
    assert len(waiting) == 1
    with pytest.raises((ValueError, KeyError)):
        waiting.remove(One(B))
    assert len(waiting) == 1


# Shares


def test_a_share_that_comes_starts_with_the_least_served_one():
    shares = FairShares()
    shares.enter(A)
    shares.charge(A, 70)
    shares.enter(B)
    shares.charge(B, 10)
    shares.enter(C)
    assert shares.served(C) == 70


def test_a_share_keeps_what_it_got_while_any_request_of_it_is_there():
    shares = FairShares()
    shares.enter(A)
    shares.enter(A)
    shares.charge(A, 50)
    shares.leave(A)
    assert shares.served(A) == 50
    shares.enter(A)
    assert shares.served(A) == 50
    shares.leave(A)
    shares.leave(A)
    shares.enter(A)
    assert shares.served(A) == 0, "there is nobody to be ahead of"


def test_tokens_of_a_share_that_left_are_not_counted():
    shares = FairShares()
    shares.charge(A, 10)
    assert shares.served(A) == 0
    shares.enter(A)
    shares.leave(A)
    shares.charge(A, 10)
    shares.enter(A)
    assert shares.served(A) == 0
