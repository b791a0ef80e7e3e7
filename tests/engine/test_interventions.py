"""Requests with interventions in their links: the answers of the formulas, in the compiled layer call if it can."""

import gc
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from loraplex import MultiLoraModel
from loraplex.engine.config import EngineConfig
from loraplex.engine.engine import Engine
from loraplex.engine.worker.fusion import layer_stack
from loraplex.errors import EngineError, RequestError
from loraplex.residual import GateResidual, parse_positions
from tests.engine.engines import (
    Prompted,
    add_residuals,
    answer,
    assert_same,
    make_model,
    module_by_module,
    prompts,
    write_adapters,
)
from tests.residual.tiny_interventions import random_block_vector, random_reft
from tests.tiny_models import tiny_model

NUM_TOKENS = 6
CONFIG = EngineConfig(cache_bytes=2**22)
CONFIGS = {
    "together": CONFIG,
    "small chunks, small blocks": EngineConfig(cache_bytes=2**22, max_step_tokens=12, block_tokens=4),
    "few blocks": EngineConfig(cache_bytes=2**18, max_length=60, max_step_tokens=40),
}
VECTORS = ("calm", "calm:-0.5+loud", "mlp", "0+calm:0.5", "science+calm", "0:0.5+v+mlp:0.3", "late", "v")
OTHERS = ("reft", "science+reft", "gate:0.5", "2+gate", "last+calm", "ra+calm", "f+reft")
PLAIN = (None, "0", "science")


def add_interventions(model: MultiLoraModel, *, gate: str | None = None) -> MultiLoraModel:
    base = model.base
    model.load_residual("calm", random_block_vector(base, 1))
    model.load_residual("loud", random_block_vector(base, 2, at=[1]))
    model.load_residual("mlp", random_block_vector(base, 3, "mlp"))
    model.load_residual("late", random_block_vector(base, 4, positions=parse_positions("generated")))
    model.load_residual("last", random_block_vector(base, 5, positions=parse_positions("f3+l4")))
    model.load_residual("reft", random_reft(base, 6, parse_positions("f3+l4")))
    if gate is not None:
        width = base.get_submodule(gate).out_features
        model.load_residual("gate", GateResidual(outputs={gate: torch.rand(width, generator=draw(7)) * 2}))
    return model


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


GATES = {"llama": "model.layers.0.mlp.up_proj", "gemma2": "model.layers.1.self_attn.v_proj"}


@pytest.fixture(scope="module", params=GATES)
def served(request, tmp_path_factory):
    """A model, prompts for all kinds of links, and the answers of `generate`."""
    name = request.param
    model = add_residuals(make_model(name, write_adapters(name, tmp_path_factory.mktemp("adapters"))))
    add_interventions(model, gate=GATES[name])
    asked = prompts((5, 40, 33, 9, 17), (*VECTORS, *OTHERS, *PLAIN))
    return model, asked, [answer(model, prompted, NUM_TOKENS) for prompted in asked]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> MultiLoraModel:
    folders = write_adapters("llama", tmp_path_factory.mktemp("llama"))
    return add_interventions(add_residuals(make_model("llama", folders)), gate=GATES["llama"])


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_answers_equal_generates_also_from_a_warm_prefix_cache(served, config):
    model, asked, expected = served
    with Engine(model, config) as engine:
        for _ in range(2):
            results = engine.generate([prompted.request(max_tokens=NUM_TOKENS) for prompted in asked])
            for prompted, result, tokens in zip(asked, results, expected, strict=True):
                assert_same(model, prompted, result, tokens)


def test_interventions_change_what_is_answered(served):
    _, asked, expected = served
    assert len(set(expected)) == len(asked)


def test_generations_that_give_way_lose_no_work(model):
    asked = prompts((30, 25), ("calm+reft", "late", "science+last", "reft:0.5+mlp"))
    expected = [answer(model, prompted, 40) for prompted in asked]
    with Engine(model, EngineConfig(cache_bytes=14 * 2**13, max_length=80)) as engine:
        results = engine.generate([prompted.request(max_tokens=40) for prompted in asked])
        assert engine.stats().num_preempted > 0, "the blocks must not suffice for all"
        for prompted, result, tokens in zip(asked, results, expected, strict=True):
            assert_same(model, prompted, result, tokens)


@pytest.mark.needs("compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "mistral"])
def test_vectors_in_the_compiled_call_have_the_bits_of_module_by_module(
    tmp_path: Path, calls: list[int], name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = write_adapters(name, tmp_path)
    monkeypatch.setattr("tests.engine.engines.tiny_model", lambda name: tiny_model(name, dtype=dtype))
    monkeypatch.setattr(layer_stack, "USUAL_CHUNK_KEYS", 0)  # without tiles: module by module, torch attends to chunks
    model = add_interventions(add_residuals(make_model(name, folders)))
    asked = prompts((5, 30, 11), (*VECTORS, *PLAIN))
    requests = [prompted.request(max_tokens=7, logprobs=2) for prompted in asked]
    with Engine(model, EngineConfig(cache_bytes=2**22, prefix_cache=False)) as engine:
        calls.clear()
        together = engine.generate(requests)
        assert max(calls) >= len(VECTORS), "rows with vectors in one call"
        one_by_one = module_by_module(engine, model.base.model.layers[1].mlp.down_proj, requests, calls)
    for prompted, ours, theirs in zip(asked, together, one_by_one, strict=True):
        assert (ours.error, ours.token_ids, ours.logprobs) == (None, theirs.token_ids, theirs.logprobs), prompted


@pytest.mark.needs("compiler")
@pytest.mark.parametrize("name", ["gpt_neox", "gpt2", "phi3"])
def test_vectors_in_compiled_layers_of_other_kinds(tmp_path: Path, calls: list[int], name: str) -> None:
    """Parallel layers, norms with a mean, modules that give several parts."""
    model = MultiLoraModel(tiny_model(name))
    add_interventions(model)
    model.load_residual("v", random_block_vector(model.base, 8, "attention"))
    asked = prompts((5, 30, 11), ("calm", "mlp:0.5+calm", "v", "late", None))
    with Engine(model, CONFIG) as engine:
        calls.clear()
        results = engine.generate([prompted.request(max_tokens=5) for prompted in asked])
        assert max(calls) >= len(asked)
    for prompted, result in zip(asked, results, strict=True):
        assert_same(model, prompted, result, answer(model, prompted, 5))


@pytest.mark.needs("compiler")
def test_interventions_on_the_prompt_alone_leave_decoding_to_the_compiled_call(model, calls):
    with Engine(model, EngineConfig(cache_bytes=2**22, prefix_cache=False)) as engine:
        for choice, is_compiled in (
            ("reft", True),
            ("calm", True),
            ("gate", False),
            ("ra+calm", True),
            ("f+calm", False),
        ):
            calls.clear()
            prompted = Prompted(tuple(range(20, 50)), choice)
            result = engine.generate([prompted.request(max_tokens=6)])[0]
            assert_same(model, prompted, result, answer(model, prompted, 6))
            assert (len(calls) >= 5) == is_compiled, choice


@pytest.mark.parametrize(
    ("choice", "shared", "longer"),
    [("calm", 32, 32), ("late", 32, 32), ("reft", 32, 0), ("last", 32, 0), ("gate", 32, 32)],
)
def test_prefixes_are_shared_where_they_are_the_same(model, choice, shared, longer):
    prompt = tuple(range(20, 60))
    with Engine(model, CONFIG) as engine:
        for other in (None, "0", "calm", "late", "reft", "last", "gate", "calm:0.5", "calm+loud"):
            if other not in (choice, None if choice == "late" else ""):
                engine.generate([Prompted(prompt, other).request(max_tokens=1)])
        first = engine.generate([Prompted(prompt, choice).request(max_tokens=1)])[0]
        assert first.num_cached_tokens == 0 or choice == "late", "it took another link's keys and values"
        again = engine.generate([Prompted(prompt, choice).request(max_tokens=5)])[0]
        assert again.num_cached_tokens == shared
        prompted = Prompted((*prompt, 7, 8, 9), choice)  # another prompt: other tokens are its last
        result = engine.generate([prompted.request(max_tokens=5)])[0]
        assert result.num_cached_tokens == longer
        assert_same(model, prompted, result, answer(model, prompted, 5))


def test_generated_tokens_are_no_prefix_of_a_prompt(model):
    with Engine(model, EngineConfig(cache_bytes=2**22, block_tokens=4)) as engine:
        prompted = Prompted(tuple(range(20, 30)), "late")
        made = engine.generate([prompted.request(max_tokens=20)])[0].token_ids
        next_turn = Prompted((*prompted.prompt, *made[:16]), "late")
        result = engine.generate([next_turn.request(max_tokens=8)])[0]
        assert_same(model, next_turn, result, answer(model, next_turn, 8))


def test_an_unloaded_vector_is_forgotten_once_its_requests_have_ended(model):
    model.load_residual("gone", random_block_vector(model.base, 9))
    kept = weakref.ref(model.registry.linked.get("gone"))
    asked = [Prompted(tuple(range(20, 40)), "gone"), Prompted(tuple(range(21, 40)), "gone+calm")]
    expected = [answer(model, prompted, 4) for prompted in asked]
    with Engine(model, CONFIG) as engine:
        ids = [engine.add_request(prompted.request(max_tokens=4)) for prompted in asked]
        engine.step()
        model.unload("gone")
        while engine.has_work:
            engine.step()
        for prompted, request_id, tokens in zip(asked, ids, expected, strict=True):
            assert engine.pop_result(request_id).token_ids == tokens, prompted
        gc.collect()
        assert kept() is None, "the engine holds a residual that nothing uses"


def test_hooks_that_were_taken_away_come_back_with_the_next_pass(model):
    prompted = Prompted(tuple(range(20, 40)), "gate")
    expected = answer(model, prompted, 6)
    with Engine(model, CONFIG) as engine:
        request_id = engine.add_request(prompted.request(max_tokens=6))
        engine.step()
        model.registry.linked.detach()
        while engine.has_work:
            engine.step()
        assert engine.pop_result(request_id).token_ids == expected


def test_hooks_taken_away_inside_of_a_pass_end_it(model):
    prompted = Prompted(tuple(range(20, 40)), "gate")
    with Engine(model, CONFIG) as engine:
        handle = model.base.model.norm.register_forward_hook(lambda *args: model.registry.linked.detach())
        result = engine.generate([prompted.request(max_tokens=6)])[0]
        handle.remove()
    assert isinstance(result.error, EngineError)


def test_a_requests_layers_are_those_of_a_vector_with_these_layers_alone(model):
    """Beside rows that have the same vector everywhere; prefixes are shared between equal layers only."""
    whole = model.registry.linked.get("calm")
    model.load_residual("at1", replace(whole, vectors={1: whole.vectors[1]}))
    prompt = tuple(range(20, 60))
    expected = {name: answer(model, Prompted(prompt, f"{name}:0.5"), 5) for name in ("calm", "at1")}
    assert expected["calm"] != expected["at1"], "the layers make no difference"
    restricted = Prompted(prompt, "calm:0.5").asking(5, residual_layers={"calm": (1,)})
    with Engine(model, CONFIG) as engine:
        first, second = engine.generate([restricted, Prompted(prompt, "calm:0.5").request(max_tokens=5)])
        assert (first.token_ids, second.token_ids) == (expected["at1"], expected["calm"])
        again = engine.generate([restricted])[0]
        assert (again.token_ids, again.num_cached_tokens) == (expected["at1"], 32)
        for layers, names in (({"loud": (1,)}, "loud"), ({"calm": (7,)}, "has none"), ({"calm": ()}, "tuple")):
            with pytest.raises(RequestError, match=names):
                engine.add_request(Prompted(prompt, "calm").asking(5, residual_layers=layers))
    model.unload("at1")
