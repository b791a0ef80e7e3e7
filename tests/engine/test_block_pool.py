"""The block pool and the block table: who holds what, what can be found again, and which block goes first."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from loraplex.engine.kv.block_pool import BlockPool, BlockTable


class PoolMachine(RuleBasedStateMachine):
    """Holders that come and go, against a plain model: blocks held, contents known, idle ones oldest first."""

    @initialize(num_blocks=st.integers(1, 6))
    def begin(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks, 4)
        self.held: dict[int, int] = {}  # holders by block
        self.known: dict[bytes, int] = {}
        self.idle: list[int] = []  # held by nobody, contents known, oldest first

    @precondition(lambda self: len(self.held) < self.pool.num_blocks)
    @rule()
    def take(self) -> None:
        block = self.pool.allocate()
        assert block not in self.held, "a block that is held was given away"
        free = set(range(self.pool.num_blocks)) - self.held.keys() - set(self.idle)
        if free:
            assert block in free, "known contents were thrown away though a block was free"
        else:
            assert block == self.idle.pop(0), "not the block that was idle for longest"
            self.known = {key: other for key, other in self.known.items() if other != block}
        self.held[block] = 1

    @precondition(lambda self: self.held)
    @rule(data=st.data(), number=st.integers(0, 5))
    def name(self, data: st.DataObject, number: int) -> None:
        key = bytes([number])
        block = data.draw(st.sampled_from(sorted(self.held)))
        if block in self.known.values():  # a track names each of its blocks once
            return
        self.pool.cache_full_block(block, key)
        self.known.setdefault(key, block)

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def find_and_hold(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.known)))
        block = self.pool.get_cached_block(key)
        assert block == self.known[key]
        self.pool.touch(block)
        self.held[block] = self.held.get(block, 0) + 1
        if block in self.idle:
            self.idle.remove(block)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted(self.held)))
        self.pool.free(block)
        self.held[block] -= 1
        if self.held[block] == 0:
            del self.held[block]
            if block in self.known.values():
                self.idle.append(block)

    @rule()
    def forget_all_idle(self) -> None:
        self.pool.forget_all_idle()
        self.known = {key: block for key, block in self.known.items() if block in self.held}
        self.idle = []

    @invariant()
    def counts_add_up(self) -> None:
        assert self.pool.num_held == len(self.held)
        assert self.pool.num_available == self.pool.num_blocks - len(self.held)

    @invariant()
    def exactly_what_is_known_is_found(self) -> None:
        for number in range(6):
            assert self.pool.get_cached_block(bytes([number])) == self.known.get(bytes([number]))


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def test_every_block_is_given_once_until_none_is_left():
    pool = BlockPool(5, 4)
    assert sorted(pool.allocate() for _ in range(5)) == [0, 1, 2, 3, 4]
    assert (pool.num_available, pool.num_held) == (0, 5)
    with pytest.raises(AssertionError, match="none is available"):
        pool.allocate()


def test_a_block_is_available_once_its_last_holder_left():
    pool = BlockPool(1, 4)
    block = pool.allocate()
    pool.touch(block)
    pool.free(block)
    assert pool.num_available == 0
    pool.free(block)
    assert pool.num_available == 1
    with pytest.raises(AssertionError, match="left more often than held"):
        pool.free(block)


def test_a_block_that_is_used_again_loses_its_name():
    pool = BlockPool(1, 4)
    block = pool.allocate()
    pool.cache_full_block(block, b"old")
    pool.free(block)
    assert pool.allocate() == block
    assert pool.get_cached_block(b"old") is None
    pool.cache_full_block(block, b"new")
    assert pool.get_cached_block(b"new") == block
    pool.free(block)
    assert pool.get_cached_block(b"new") == block, "contents stay known while nobody needs the room"


def test_of_two_blocks_with_the_same_contents_the_first_is_found():
    pool = BlockPool(3, 4)
    first, second = pool.allocate(), pool.allocate()
    pool.cache_full_block(first, b"same")
    pool.cache_full_block(second, b"same")
    assert pool.get_cached_block(b"same") == first
    pool.free(second)  # it has no name, so it is free at once, before anything known is thrown away
    pool.free(first)
    assert {pool.allocate(), pool.allocate()} == {second, 3 - first - second}
    assert pool.get_cached_block(b"same") == first


def test_using_a_known_block_makes_it_the_youngest():
    pool = BlockPool(2, 4)
    blocks = [pool.allocate(), pool.allocate()]
    for block in blocks:
        pool.cache_full_block(block, bytes([block]))
    for block in blocks:
        pool.free(block)
    pool.touch(blocks[0])
    pool.free(blocks[0])
    assert [pool.allocate(), pool.allocate()] == [blocks[1], blocks[0]]


# The table of every track's blocks


def test_rows_of_the_table_are_held_by_one_track_each():
    table = BlockTable(2, 3, torch.device("cpu"))
    rows = [table.take_row() for _ in range(5)]
    assert len(set(rows)) == 5
    assert table.num_rows_held == 5
    assert table.values.shape[0] >= 5
    table.leave_row(rows[2])
    assert table.num_rows_held == 4
    assert table.take_row() == rows[2]


def test_a_table_that_grows_keeps_what_is_in_it():
    table = BlockTable(1, 3, torch.device("cpu"))
    first = table.take_row()
    table.set(first, 0, [4, 9])
    second = table.take_row()
    table.set(second, 1, [7])
    assert table.values[first].tolist() == [4, 9, 0]
    assert table.values[second, 1] == 7


def test_slots_are_the_block_of_a_position_and_the_place_in_it():
    table = BlockTable(2, 3, torch.device("cpu"))
    row = table.take_row()
    table.set(row, 0, [5, 2, 8])
    blocks, places = table.slots(torch.full((4,), row), torch.tensor([0, 3, 4, 11]), 4)
    assert blocks.tolist() == [5, 5, 2, 8]
    assert places.tolist() == [0, 3, 0, 3]
