"""Chunks, priorities, fair shares, giving way, the prefix cache: who runs when, and that nothing is lost."""

import pytest

from loraplex import MultiLoraModel
from loraplex.engine.config import EngineConfig
from loraplex.engine.engine import Engine
from loraplex.engine.kv.block_pool import BlockPool
from loraplex.engine.request import Request
from loraplex.engine.sampling.params import SamplingParams
from loraplex.engine.sched.request_queue import FairShares
from tests.engine.engines import Prompted, answer, assert_same, make_model, prompts, write_adapters

BLOCK_BYTES = 2 * 2 * 2 * 16 * 4 * 16  # of the tiny llama: keys and values, layers, heads, dim, float32, tokens


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> MultiLoraModel:
    return make_model("llama", write_adapters("llama", tmp_path_factory.mktemp("llama")))


def run(engine: Engine, order: list[str]) -> list[str]:
    """Step until all is done; the ids in the order in which they ended."""
    while engine.has_work:
        order += [delta.request_id for delta in engine.step() if delta.finish_reason is not None]
    return order


def test_generations_that_give_way_lose_no_work(model):
    asked = prompts((30, 25), [None, "0", "science", "1"])
    expected = [answer(model, prompted, 40) for prompted in asked]
    with Engine(model, EngineConfig(cache_bytes=14 * BLOCK_BYTES, max_length=80)) as engine:
        results = engine.generate([prompted.request(max_tokens=40) for prompted in asked])
        stats = engine.stats()
    assert stats.num_preempted > 0, "the blocks must not suffice for all"
    assert stats.num_blocks_held == 0
    for prompted, result, tokens in zip(asked, results, expected, strict=True):
        assert_same(model, prompted, result, tokens)


def test_higher_priority_goes_first_and_makes_others_give_way(model):
    sampling = SamplingParams(max_tokens=20)
    with Engine(model, EngineConfig(cache_bytes=2**22, max_running=1)) as engine:
        slow = [engine.add_request(Request(range(10 + i, 30 + i), sampling=sampling)) for i in range(3)]
        for _ in range(3):
            engine.step()
        urgent = engine.add_request(Request(range(5, 20), sampling=sampling, priority=1))
        order = run(engine, [])
        assert order[0] == urgent
        assert sorted(order[1:]) == sorted(slow)
        for i, request_id in enumerate(slow):
            expected = answer(model, Prompted(tuple(range(10 + i, 30 + i)), None), 20)
            assert_same(model, Prompted(tuple(range(10 + i, 30 + i)), None), engine.pop_result(request_id), expected)


def test_one_tenant_with_many_requests_does_not_starve_another(model):
    sampling = SamplingParams(max_tokens=30)
    with Engine(model, EngineConfig(cache_bytes=2**22, max_running=4, fair_tokens=32)) as engine:
        many = [engine.add_request(Request([7, 8, 9, i + 1], adapters="0", sampling=sampling)) for i in range(40)]
        for _ in range(5):
            engine.step()
        one = engine.add_request(Request([7, 8, 9], adapters="1", sampling=sampling))
        order = run(engine, [])
    assert set(order) == {*many, one}
    assert order.index(one) < 12, "the lone request waited for more than its share"


def test_shares_that_come_back_save_up_no_credit():
    shares = FairShares()
    shares.enter(("a",))
    shares.charge(("a",), 100)
    shares.enter(("b",))
    assert shares.served(("b",)) == 100
    shares.leave(("a",))
    shares.enter(("a",))
    assert shares.served(("a",)) == 100
    shares.leave(("a",))
    shares.leave(("b",))
    assert shares.served(("b",)) == 0


def test_a_long_prompt_does_not_hold_up_answers(model):
    with Engine(model, EngineConfig(cache_bytes=2**22, max_step_tokens=16)) as engine:
        first = engine.add_request(Request([5, 6, 7], sampling=SamplingParams(max_tokens=20)))
        engine.step()
        engine.add_request(Request(list(range(1, 101)), adapters="0", sampling=SamplingParams(max_tokens=2)))
        for _ in range(5):
            assert first in {delta.request_id for delta in engine.step()}


@pytest.mark.parametrize("choice", [None, "0", "science", "second", "alora"])
def test_a_prefix_is_computed_once_for_each_choice_of_adapters(model, choice):
    prefix = tuple(range(10, 74))  # four blocks
    sampling = {"max_tokens": 6}
    with Engine(model, EngineConfig(cache_bytes=2**22)) as engine:
        first = Prompted((*prefix, 3, 4), choice)
        second = Prompted((*prefix, 9), choice)
        assert engine.generate([first.request(**sampling)])[0].num_cached_tokens == 0
        result = engine.generate([second.request(**sampling)])[0]
        assert result.num_cached_tokens == 64
        assert_same(model, second, result, answer(model, second, 6))
        engine.clear_prefix_cache()
        assert engine.generate([second.request(**sampling)])[0].num_cached_tokens == 0


def test_prefixes_of_other_adapters_weights_and_versions_are_not_shared(model, tmp_path):
    folder = tmp_path / "own"
    own = make_model("llama", write_adapters("llama", folder))
    prompt = tuple(range(10, 60))
    with Engine(own, EngineConfig(cache_bytes=2**22)) as engine:
        for choice in (None, "0", "1", "0:0.5", "0+1", "science", "science:0.5", "second"):
            prompted = Prompted(prompt, choice)
            result = engine.generate([prompted.request(max_tokens=5)])[0]
            assert result.num_cached_tokens == 0, f"{choice} took another choice's keys and values"
            assert_same(own, prompted, result, answer(own, prompted, 5))
        own.load_adapter("alora", folder / "0", replace=True)  # another adapter under a name that was never used
        own.unload("alora")
        own.load_adapter("alora", folder / "2")
        first = engine.generate([Prompted(prompt, "alora").request(max_tokens=5)])[0]
        own.load_adapter("alora", folder / "0", replace=True)
        second = engine.generate([Prompted(prompt, "alora").request(max_tokens=5)])[0]
    assert second.num_cached_tokens == 0
    assert first.token_ids != second.token_ids


def test_an_alora_row_reuses_the_base_models_prefix_up_to_its_invocation(model):
    before = tuple(range(10, 60))
    prompted = Prompted((*before, 5, 6, 11, 12), "alora")
    with Engine(model, EngineConfig(cache_bytes=2**22)) as engine:
        engine.generate([Prompted(before, None).request(max_tokens=2)])
        result = engine.generate([prompted.request(max_tokens=6)])[0]
    assert result.num_cached_tokens == 48
    assert_same(model, prompted, result, answer(model, prompted, 6))


def test_a_scaling_pass_reuses_the_base_models_prefix(model):
    prompt = tuple(range(10, 60))
    with Engine(model, EngineConfig(cache_bytes=2**22, draft=False)) as engine:
        engine.generate([Prompted(prompt, "science").request(max_tokens=1)])
        alone = engine.stats().counts.num_scaling_tokens
        engine.clear_prefix_cache()
        engine.generate([Prompted(prompt, "science").request(max_tokens=1)])
        assert engine.stats().counts.num_scaling_tokens == 2 * alone
        result = engine.generate([Prompted((*prompt, 3), None).request(max_tokens=1)])[0]
    assert result.num_cached_tokens == 48, "a base request reuses what the scaling pass computed"


def test_requests_that_begin_alike_wait_for_the_first_to_compute_it(model):
    prefix = list(range(1, 97))
    with Engine(model, EngineConfig(cache_bytes=2**22, max_step_tokens=32)) as engine:
        requests = [Request([*prefix, i], adapters="0", sampling=SamplingParams(max_tokens=3)) for i in range(1, 6)]
        results = engine.generate(requests)
        counts = engine.stats().counts
    assert [result.num_cached_tokens for result in results] == [0, 96, 96, 96, 96]
    assert counts.num_prompt_tokens == 97 + 4


def test_blocks_are_evicted_oldest_first_and_never_while_held():
    pool = BlockPool(3, 4)
    first, second, held = pool.allocate(), pool.allocate(), pool.allocate()
    for block, key in ((first, b"1"), (second, b"2"), (held, b"3")):
        pool.cache_full_block(block, key)
    pool.free(second)
    pool.free(first)
    assert (pool.num_available, pool.num_held) == (2, 1)
    assert pool.allocate() == second
    assert pool.get_cached_block(b"2") is None
    assert pool.get_cached_block(b"1") == first
    pool.touch(first)
    assert pool.num_available == 0
    pool.free(first)
    pool.forget_all_idle()
    assert pool.get_cached_block(b"1") is None
    assert pool.get_cached_block(b"3") == held
