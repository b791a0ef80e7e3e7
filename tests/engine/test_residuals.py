"""Requests with residuals in their links: the tokens of `generate`, whatever runs beside them, and nothing left."""

import gc
import weakref

import pytest
import torch

from loraplex import MultiLoraModel
from loraplex.engine.config import EngineConfig
from loraplex.engine.engine import Engine
from loraplex.engine.request import Request
from loraplex.engine.sampling.params import SamplingParams
from loraplex.errors import AdapterError, AdapterNotFoundError
from loraplex.residual.modules import FunctionResidual, ResidualContext
from tests.engine.engines import (
    CHOICES,
    LINKED_CHOICES,
    Prompted,
    add_residuals,
    answer,
    assert_same,
    make_model,
    prompts,
    write_adapters,
)
from tests.residual.tiny_residuals import random_linked

NUM_TOKENS = 8
CONFIG = EngineConfig(cache_bytes=2**22)
CONFIGS = {
    "together": CONFIG,
    "small chunks, small blocks": EngineConfig(cache_bytes=2**22, max_step_tokens=12, block_tokens=4),
    "few blocks": EngineConfig(cache_bytes=2**18, max_length=60, max_step_tokens=40),
}
PROMPT = tuple(range(20, 60))


@pytest.fixture(scope="module", params=["llama", "mistral", "gemma2", "gpt2", "gpt_neox"])
def served(request, tmp_path_factory):
    """A model of each kind of attention, prompts for all kinds of links, and the answers of `generate`."""
    model = add_residuals(make_model(request.param, write_adapters(request.param, tmp_path_factory.mktemp("adapters"))))
    asked = prompts((5, 40, 33, 9, 17), (*LINKED_CHOICES, *CHOICES[:3]))
    return model, asked, [answer(model, prompted, NUM_TOKENS) for prompted in asked]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> MultiLoraModel:
    return add_residuals(make_model("llama", write_adapters("llama", tmp_path_factory.mktemp("llama"))))


def check_nothing_held(engine: Engine) -> None:
    stats = engine.stats()
    assert (stats.num_blocks_held, stats.num_passes, stats.num_running, stats.num_waiting) == (0, 0, 0, 0)
    engine.clear_prefix_cache()
    assert engine._runner.attention.responses.num_bytes == 0


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_answers_equal_generates_also_from_a_warm_prefix_cache(served, config):
    model, asked, expected = served
    with Engine(model, config) as engine:
        for is_warm in (False, True):
            results = engine.generate([prompted.request(max_tokens=NUM_TOKENS) for prompted in asked])
            for prompted, result, tokens in zip(asked, results, expected, strict=True):
                assert_same(model, prompted, result, tokens)
                is_shared = result.num_cached_tokens > 0
                if config is not CONFIGS["few blocks"] and "f" not in str(prompted.adapters) and is_warm:
                    assert is_shared == (len(prompted.prompt) > config.block_tokens), prompted.adapters
        check_nothing_held(engine)


def test_residuals_change_what_is_answered(served):
    _, asked, expected = served
    assert len(set(expected)) == len(asked)


def test_generations_that_give_way_lose_no_work(model):
    asked = prompts((30, 25), ("ra", "rb:0.5+ra", "science+rb+ra", "ra+f:0.5+v"))
    expected = [answer(model, prompted, 40) for prompted in asked]
    with Engine(model, EngineConfig(cache_bytes=14 * 2**13, max_length=80)) as engine:
        results = engine.generate([prompted.request(max_tokens=40) for prompted in asked])
        assert engine.stats().num_preempted > 0, "the blocks must not suffice for all"
        for prompted, result, tokens in zip(asked, results, expected, strict=True):
            assert_same(model, prompted, result, tokens)
        check_nothing_held(engine)


def test_several_answers_share_the_prompt_and_differ(model):
    sampling = SamplingParams(n=3, temperature=1.5, max_tokens=6)
    with Engine(model, CONFIG) as engine:
        result = engine.generate([Request(PROMPT, adapters="ra+rb", sampling=sampling)])[0]
        assert engine.stats().counts.num_prompt_tokens == 40 + 2 * 8
    assert len({completion.token_ids for completion in result.completions}) == 3


@pytest.mark.parametrize("choice", ["ra", "ra:0.5", "ra+rb", "rb+ra", "0+ra", "v", "f"])
def test_prefixes_of_other_links_are_not_shared(model, choice):
    with Engine(model, CONFIG) as engine:
        for other in ("ra", "ra:0.5", "ra+rb", "rb+ra", "0+ra", "v", "f", "0", None):
            if other != choice:
                engine.generate([Request(PROMPT, adapters=other, sampling=SamplingParams(max_tokens=1))])
        asked = Prompted(PROMPT, choice)
        result = engine.generate([asked.request(max_tokens=5)])[0]
        assert result.num_cached_tokens == 0, f"{choice} took another link's keys and values"
        again = engine.generate([asked.request(max_tokens=5)])[0]
        assert again.num_cached_tokens == (0 if choice == "f" else 32), "a function may have changed"


def test_a_running_request_keeps_its_residual_and_new_ones_get_the_new(model):
    layers = model.registry.linked.layers
    model.load_residual("r", random_linked(layers, 5))
    asked = Prompted(PROMPT, "r+0")
    old = answer(model, asked, 8)
    with Engine(model, CONFIG) as engine:
        running = engine.add_request(asked.request(max_tokens=8))
        engine.step()
        engine.step()
        model.load_residual("r", random_linked(layers, 6), replace=True)
        late = engine.add_request(asked.request(max_tokens=8))
        while engine.has_work:
            engine.step()
        new = answer(model, asked, 8)
        assert new != old, "the new residual must change the answer"
        assert engine.pop_result(running).token_ids == old
        result = engine.pop_result(late)
        assert result.num_cached_tokens == 0
        assert_same(model, asked, result, new)
    model.unload("r")


def test_an_unloaded_residual_is_forgotten_once_its_requests_have_ended(model):
    model.load_residual("r", random_linked(model.registry.linked.layers, 5))
    kept = weakref.ref(model.registry.linked.get("r"))
    asked = [Prompted(PROMPT, "r"), Prompted(PROMPT[1:], "r")]  # decoded together
    expected = [answer(model, prompted, 4) for prompted in asked]
    with Engine(model, CONFIG) as engine:
        ids = [engine.add_request(prompted.request(max_tokens=4)) for prompted in asked]
        engine.step()
        model.unload("r")
        while engine.has_work:
            engine.step()
        for prompted, request_id, tokens in zip(asked, ids, expected, strict=True):
            assert engine.pop_result(request_id).token_ids == tokens, prompted
        gc.collect()
        assert kept() is None, "the engine holds a residual that nothing uses"
        with pytest.raises(AdapterNotFoundError, match="'r'"):
            engine.add_request(asked[0].request())


def test_cancelled_requests_free_what_they_held(model):
    asked = prompts((12, 40), LINKED_CHOICES)
    with Engine(model, CONFIG) as engine:
        ids = [engine.add_request(prompted.request(max_tokens=10)) for prompted in asked]
        for _ in range(3):
            engine.step()
        for request_id in ids:
            engine.cancel(request_id)
        engine.step()
        assert all(engine.pop_result(request_id).finish_reason == "cancelled" for request_id in ids)
        check_nothing_held(engine)


# What a function does wrong, at which of its calls.
FAILURES = {
    "raises": lambda hidden: 1 / 0,
    "NaN": lambda hidden: hidden * float("nan"),
    "other shape": lambda hidden: hidden[:, 1:],
}


@pytest.mark.parametrize("call", [1, 5])
@pytest.mark.parametrize("failure", FAILURES)
def test_a_function_that_fails_ends_its_own_request_at_that_step(model, failure, call):
    num_calls = 0

    def fails(hidden: torch.Tensor, attention: torch.Tensor, context: ResidualContext) -> torch.Tensor:
        nonlocal num_calls
        num_calls += 1
        return FAILURES[failure](hidden) if num_calls == call else hidden * 0.1

    model.load_residual("bad", FunctionResidual(function=fails, layers=(0,)), replace=True)
    others = prompts((12,), ("f", "ra", "science", None))
    expected = [answer(model, prompted, 8) for prompted in others]
    with Engine(model, CONFIG) as engine:
        asked = [Request(PROMPT, adapters="science+bad+ra", sampling=SamplingParams(max_tokens=8))]
        failed, *results = engine.generate([*asked, *(prompted.request(max_tokens=8) for prompted in others)])
        check_nothing_held(engine)
    assert failed.finish_reason == "error"
    assert isinstance(failed.error, AdapterError)
    assert "'bad' at layer 0" in str(failed.error)
    assert (len(failed.token_ids), num_calls) == (call - 1, call), "it ends at the step of the failure"
    for prompted, result, tokens in zip(others, results, expected, strict=True):
        assert_same(model, prompted, result, tokens)
