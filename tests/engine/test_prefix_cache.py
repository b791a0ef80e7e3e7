"""Tracks: the blocks of a pass, and which earlier ones it begins with."""

from collections.abc import Iterable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex.engine.kv.block_pool import BlockPool, BlockTable
from loraplex.engine.kv.sequence_kv import ExtraKey, SequenceKV

BLOCK = 4
ADAPTER, OTHER = ExtraKey(identity=("adapter", 1)), ExtraKey(identity=("adapter", 2))


class Cache:
    def __init__(self, num_blocks: int = 32) -> None:
        self.pool = BlockPool(num_blocks, BLOCK)
        self.table = BlockTable(4, 32, torch.device("cpu"))

    def kv(self, tokens: Iterable[int], *keys: ExtraKey) -> SequenceKV:
        return SequenceKV(list(tokens), (), keys, self.pool, self.table)

    def compute(self, tokens: Iterable[int], *keys: ExtraKey, certain: int | None = None) -> SequenceKV:
        """A track whose tokens have all run; the first `certain` of them are no drafts."""
        kv = self.kv(tokens, *keys)
        kv.reuse(len(kv.tokens))
        kv.grow(len(kv.tokens))
        kv.num_computed = len(kv.tokens)
        kv.cache_full_blocks(len(kv.tokens) if certain is None else certain)
        return kv

    def found(self, tokens: Iterable[int], *keys: ExtraKey) -> int:
        """How many tokens of a prompt are known."""
        kv = self.kv(tokens, *keys)
        kv.reuse(len(kv.tokens))
        found = kv.num_computed
        kv.close()
        return found


@pytest.fixture
def cache() -> Cache:
    return Cache()


def test_whole_blocks_of_the_same_beginning_are_found(cache):
    cache.compute(range(10))
    assert cache.found(range(10)) == 8
    assert cache.found([*range(8), 99, 99, 99, 99]) == 8
    assert cache.found([*range(7), 99]) == 4
    assert cache.found([99, *range(1, 10)]) == 0
    assert cache.found(range(3)) == 0


def test_a_block_is_known_with_all_that_comes_before_it_only(cache):
    cache.compute([1, 1, 1, 1, 5, 6, 7, 8])
    assert cache.found([2, 2, 2, 2, 5, 6, 7, 8]) == 0
    cache.compute([2, 2, 2, 2])
    assert cache.found([2, 2, 2, 2, 5, 6, 7, 8]) == 4


def test_adapters_have_prefixes_of_their_own(cache):
    cache.compute(range(8), ADAPTER)
    assert cache.found(range(8), ADAPTER) == 8
    for keys in ((), (OTHER,), (ADAPTER, OTHER), (OTHER, ADAPTER)):
        assert cache.found(range(8), *keys) == 0
    cache.compute(range(8), ADAPTER, OTHER)
    assert cache.found(range(8), OTHER, ADAPTER) == 0, "a link's order changes its roundings"


@pytest.mark.parametrize(("active_from", "shared"), [(0, 0), (3, 0), (4, 4), (7, 4), (8, 8), (50, 12)])
def test_what_is_active_from_a_token_on_shares_the_blocks_before_it(cache, active_from, shared):
    cache.compute(range(12))
    late = ExtraKey(identity=("alora", 1), active_from=active_from)
    assert cache.found(range(12), late) == shared
    cache.compute(range(12), late)
    assert cache.found(range(12), late) == 12


def test_tokens_that_look_alike_when_written_side_by_side_differ(cache):
    cache.compute([1, 23, 4, 5])
    assert cache.found([12, 3, 4, 5]) == 0
    assert cache.found([1, 2, 34, 5]) == 0


def test_most_limits_what_is_reused(cache):
    cache.compute(range(12))
    kv = cache.kv(range(12))
    kv.reuse(11)
    assert (kv.num_computed, len(kv.blocks)) == (8, 2)


def test_shared_blocks_are_held_until_the_last_track_leaves(cache):
    first = cache.compute(range(8))
    second = cache.kv(range(8))
    second.reuse(8)
    assert second.blocks == first.blocks
    assert cache.pool.num_held == 2
    first.close()
    assert cache.pool.num_held == 2
    second.close()
    assert cache.pool.num_held == 0
    assert cache.table.num_rows_held == 0
    assert cache.found(range(8)) == 8, "they stay until their room is needed"


def test_the_end_of_a_prefix_is_evicted_before_its_beginning():
    cache = Cache(num_blocks=3)
    cache.compute(range(12)).close()
    for known in (8, 4, 0):
        cache.pool.allocate()
        assert cache.found(range(12)) == known


def test_drafts_are_not_known(cache):
    kv = cache.compute(range(8), certain=7)
    assert cache.found(range(8)) == 4
    kv.cache_full_blocks(8)
    assert cache.found(range(8)) == 8


def test_tokens_that_have_not_run_are_not_known(cache):
    kv = cache.kv(range(8))
    kv.grow(8)
    kv.num_computed = 5
    kv.cache_full_blocks(8)
    assert cache.found(range(8)) == 4


def test_a_track_goes_on_with_tokens_of_its_own_in_blocks_of_its_own(cache):
    cache.compute(range(8))
    one, two = cache.kv([*range(8), 50]), cache.kv([*range(8), 60])
    for kv in (one, two):
        kv.reuse(8)
        kv.grow(9)
    assert one.blocks[:2] == two.blocks[:2]
    assert one.blocks[2] != two.blocks[2]
    assert cache.table.values[two.row, :3].tolist() == two.blocks


def test_growing_takes_only_the_blocks_that_are_missing(cache):
    kv = cache.kv(range(12))
    assert [kv.blocks_missing(n) for n in (0, 1, 4, 5, 12)] == [0, 1, 1, 2, 3]
    kv.grow(5)
    assert [kv.blocks_missing(n) for n in (5, 8, 9)] == [0, 0, 1]
    before = list(kv.blocks)
    kv.grow(8)
    kv.grow(3)
    assert kv.blocks == before


def test_a_dropped_track_begins_anew_and_finds_what_it_named(cache):
    kv = cache.compute(range(10))
    kv.drop()
    assert (kv.blocks, kv.num_computed, cache.pool.num_held) == ([], 0, 0)
    kv.reuse(9)
    assert kv.num_computed == 8
    kv.grow(10)
    kv.num_computed = 10
    kv.tokens += [70, 71, 72]
    kv.grow(12)
    kv.num_computed = 12
    kv.cache_full_blocks(12)
    assert cache.found([*range(10), 70, 71]) == 12


def test_a_track_that_has_blocks_can_not_begin(cache):
    kv = cache.kv(range(8))
    kv.grow(4)
    with pytest.raises(AssertionError, match="can't begin"):
        kv.reuse(8)


def test_clearing_forgets_what_nobody_holds(cache):
    held = cache.compute(range(8))
    cache.compute(range(100, 108)).close()
    cache.pool.forget_all_idle()
    assert cache.found(range(100, 108)) == 0
    assert cache.found(range(8)) == 8
    held.close()
    assert cache.pool.num_held == 0


PROMPTS = st.lists(st.integers(0, 1), max_size=14)
SETS_OF_KEYS = st.sampled_from(((), (ADAPTER,), (ExtraKey(identity=("alora",), active_from=5),)))


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(PROMPTS, SETS_OF_KEYS), min_size=1, max_size=6), PROMPTS, SETS_OF_KEYS)
def test_what_is_found_is_the_longest_whole_prefix_that_ran(ran, prompt, keys):
    """Against comparing tokens, and what is active on them, block by block."""
    cache = Cache(64)
    for tokens, own in ran:
        cache.compute(tokens, *own).close()

    def blocks(tokens: list[int], own: tuple[ExtraKey, ...]) -> list[tuple[object, ...]]:
        """What each whole block's contents follow from."""
        made = []
        for stop in range(BLOCK, len(tokens) + 1, BLOCK):
            active = tuple((k.identity, k.active_from) for k in own if (k.active_from or 0) < stop)
            made.append((tuple(tokens[:stop]), active))
        return made

    known = {block for tokens, own in ran for block in blocks(tokens, own)}
    expected = 0
    for block in blocks(prompt, keys):
        if block not in known:
            break
        expected += BLOCK
    assert cache.found(prompt, *keys) == expected
