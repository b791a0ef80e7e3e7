"""The engine's greedy answers are those of `generate`, whatever runs beside them."""

import pytest
import torch

from loraplex import MultiLoraModel
from loraplex.engine.config import EngineConfig
from loraplex.engine.engine import Engine
from loraplex.errors import BaseModelError
from tests.engine.engines import answer, assert_same, make_model, prompts, write_adapters
from tests.tiny_models import TINY_CAUSAL_MODELS, tiny_model

NUM_TOKENS = 10
LENGTHS = (5, 20, 33, 9, 17, 12, 40, 7, 21, 70)
CONFIGS = {
    "together": EngineConfig(cache_bytes=2**24),
    "small chunks, small blocks": EngineConfig(cache_bytes=2**24, max_step_tokens=24, block_tokens=4),
    "three at a time, no drafts": EngineConfig(cache_bytes=2**24, max_running=3, draft=False),
    "few blocks": EngineConfig(cache_bytes=2**18, max_length=100, max_step_tokens=64),
}


@pytest.fixture(scope="module", params=TINY_CAUSAL_MODELS)
def served(request, tmp_path_factory):
    """A model of each architecture, prompts for all kinds of adapters, and the answers of `generate`."""
    model = make_model(request.param, write_adapters(request.param, tmp_path_factory.mktemp(request.param)))
    asked = prompts(LENGTHS)
    return model, asked, [answer(model, prompted, NUM_TOKENS) for prompted in asked]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_answers_equal_generates(served, config):
    model, asked, expected = served
    with Engine(model, config) as engine:
        results = engine.generate([prompted.request(max_tokens=NUM_TOKENS) for prompted in asked])
        stats = engine.stats()
    for prompted, result, tokens in zip(asked, results, expected, strict=True):
        assert_same(model, prompted, result, tokens)
        assert result.finish_reason == "length"
    assert (stats.num_blocks_held, stats.num_passes, stats.num_running, stats.num_waiting) == (0, 0, 0, 0)
    assert all(state.num_leases == 0 for state in model.adapters())


def test_requests_that_come_while_others_run_get_the_same_answers(served):
    model, asked, expected = served
    arrivals = torch.Generator().manual_seed(1)
    waiting = list(zip(asked, expected, strict=True))
    running = {}
    with Engine(model, EngineConfig(cache_bytes=2**24, max_step_tokens=32)) as engine:
        while waiting or engine.has_work:
            if waiting and torch.rand(1, generator=arrivals) < 0.4:
                prompted, tokens = waiting.pop()
                running[engine.add_request(prompted.request(max_tokens=NUM_TOKENS))] = prompted, tokens
            engine.step()
        for request_id, (prompted, tokens) in running.items():
            assert_same(model, prompted, engine.pop_result(request_id), tokens)


def test_the_base_model_is_what_it_was_after_close(tmp_path):
    model = make_model("gemma2", write_adapters("gemma2", tmp_path))
    before = model.base.config._attn_implementation
    prompted = prompts((12,))[0]
    expected = answer(model, prompted, 5)
    engine = Engine(model, EngineConfig(cache_bytes=2**24))
    assert answer(model, prompted, 5) == expected, "generate beside an engine"
    engine.close()
    engine.close()
    assert model.base.config._attn_implementation == before
    assert not model.base.get_output_embeddings()._forward_pre_hooks
    assert answer(model, prompted, 5) == expected


@pytest.mark.parametrize("name", ["t5", "bert"])
def test_other_than_causal_models_are_refused(name):
    base = tiny_model(name)
    before = base.config._attn_implementation
    with pytest.raises(BaseModelError, match="engine needs"):
        Engine(MultiLoraModel(base))
    assert base.config._attn_implementation == before
