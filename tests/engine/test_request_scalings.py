"""Scalings that a request asks for: those of `generate`; and salts that keep requests apart in the prefix cache."""

import pytest
import torch

from loraplex import MultiLoraModel
from loraplex.engine.config import EngineConfig
from loraplex.engine.engine import Engine
from tests.engine.engines import Prompted, assert_same, make_model, prompts, write_adapters

NUM_TOKENS = 8
CONFIGS = {
    "together": EngineConfig(cache_bytes=2**22),
    "small chunks, no drafts": EngineConfig(cache_bytes=2**22, max_step_tokens=12, block_tokens=4, draft=False),
    "few blocks": EngineConfig(cache_bytes=14 * 2**13, max_length=60, max_step_tokens=40),
}
PROMPT = tuple(range(20, 60))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> MultiLoraModel:
    return make_model("llama", write_adapters("llama", tmp_path_factory.mktemp("llama")))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_scalings_equal_generates(model, config):
    asked = prompts((9, 30, 17), ("science", "second", "science:0.5+second", "0", "science+0"))
    with Engine(model, config) as engine:
        for _ in range(2):  # the second time the prefix cache is warm
            results = engine.generate([prompted.asking(NUM_TOKENS, return_scalings=True) for prompted in asked])
            for prompted, result in zip(asked, results, strict=True):
                check_scalings(model, prompted, result)


def check_scalings(model, prompted, result):
    ids = torch.tensor([prompted.prompt])
    options = {"adapters": [prompted.adapters], "max_new_tokens": NUM_TOKENS, "do_sample": False}
    out, (expected,) = model.generate(ids, return_scalings=True, **options)
    assert_same(model, prompted, result, tuple(out[0, ids.shape[1] :].tolist()))
    assert len(result.scalings) == len(expected) == str(prompted.adapters).count("s")
    for found, row in zip(result.scalings, expected, strict=True):
        for field in ("mixture", "experts", "layers", "token_ids"):
            assert getattr(found, field) == getattr(row, field), field
        assert torch.allclose(found.values, row.values, atol=1e-5)


def test_deltas_have_the_scalings_of_the_token_that_was_run_for_them(model):
    with Engine(model, CONFIGS["together"]) as engine:
        prompted = Prompted(PROMPT, "science+second")
        request_id = engine.add_request(prompted.asking(NUM_TOKENS, return_scalings=True))
        told = []
        while engine.has_work:
            told += [entry for delta in engine.step() for entry in delta.scalings]
        result = engine.pop_result(request_id)
    means = [row.mean_by_token()[len(PROMPT) - 1 :] for row in result.scalings]
    assert len(told) == NUM_TOKENS == len(means[0])
    for place, entry in enumerate(told):
        for own, mean in zip(entry, means, strict=True):
            assert own == pytest.approx(mean[place].tolist(), abs=1e-6)


def test_requests_that_ask_for_no_scalings_get_none(model):
    with Engine(model, CONFIGS["together"]) as engine:
        request_id = engine.add_request(Prompted(PROMPT, "science").asking(3))
        deltas = [delta for _ in range(6) for delta in engine.step()]
        assert all(delta.scalings == () for delta in deltas)
        assert engine.pop_result(request_id).scalings is None
        without = engine.generate([Prompted(PROMPT, "0").asking(3, return_scalings=True)])[0]
    assert without.scalings == ()


def test_a_request_without_an_answer_has_no_scalings(model):
    with Engine(model, CONFIGS["together"]) as engine:
        request_id = engine.add_request(Prompted(PROMPT, "science").asking(3, return_scalings=True))
        engine.cancel(request_id)
        engine.step()
        assert engine.pop_result(request_id).scalings is None


@pytest.mark.parametrize("choice", [None, "0", "science", "second"])
def test_requests_share_blocks_only_with_those_of_their_salt(model, choice):
    prompted = Prompted(PROMPT, choice)
    with Engine(model, CONFIGS["together"]) as engine:
        cached = []
        for salt in ("", "a", "b", "a", "b", ""):
            result = engine.generate([prompted.asking(3, cache_salt=salt)])[0]
            cached.append(result.num_cached_tokens)
    assert cached == [0, 0, 0, 32, 32, 32]


def test_scaling_passes_keep_to_their_salt(model):
    with Engine(model, CONFIGS["together"]) as engine:
        engine.generate([Prompted(PROMPT, "science").asking(1, cache_salt="a")])
        base = Prompted((*PROMPT, 3), None)
        assert engine.generate([base.asking(1, cache_salt="b")])[0].num_cached_tokens == 0
        assert engine.generate([base.asking(1, cache_salt="a")])[0].num_cached_tokens == 32
