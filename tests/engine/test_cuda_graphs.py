"""Recorded steps on a CPU, where a replay is the same step on the same tensors: padded, with changing adapters."""

import logging

import pytest
import torch

from loraplex import MultiLoraModel
from loraplex.engine.config import EngineConfig
from loraplex.engine.engine import Engine
from loraplex.engine.worker.cuda_graphs import DecodeGraphs, padded_size, run_again
from loraplex.engine.worker.cuda_graphs_batch import StaticBatch
from loraplex.engine.worker.cuda_graphs_plan import StaticPlan
from loraplex.errors import ConfigError
from tests.engine.engines import add_residuals, answer, assert_same, make_model, prompts, write_adapters
from tests.tiny_models import linear_targets, random_peft_adapter, tiny_model

CONFIG = EngineConfig(cache_bytes=2**22, max_running=6)
CHOICES = (None, "0", "2", "0:0.5+2:0.7", "alora", "science", "second", "science+0:0.3", "0", None)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def get(name):
        if name not in made:
            made[name] = write_adapters(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


def without_embeddings(name, folders, tmp_path):
    """The adapters of `write_adapters`; "1", which adapts the embedding too, adapts linear modules only."""
    linears = random_peft_adapter(tiny_model(name), tmp_path / "linears", targets=linear_targets(name), seed=5, r=3)
    return make_model(name, {**folders(name), "1": linears})


def recorded(engine: Engine) -> DecodeGraphs:
    engine._runner.use_graphs(run_again)
    assert engine._runner.graphs is not None
    return engine._runner.graphs


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "qwen3"])
def test_answers_that_come_and_go_are_those_of_generate(name, folders, tmp_path):
    """More requests than run at once, of different lengths: every step has other rows, adapters, links and mixtures."""
    model = without_embeddings(name, folders, tmp_path)
    asked = prompts((5, 9, 14), CHOICES)
    lengths = [4 + 3 * (i % 4) for i in range(len(asked))]
    expected = [answer(model, p, n) for p, n in zip(asked, lengths, strict=True)]
    with Engine(model, CONFIG) as engine:
        graphs = recorded(engine)
        results = engine.generate([p.request(max_tokens=n) for p, n in zip(asked, lengths, strict=True)])
        assert graphs.num_replayed > 10
        assert 0 < graphs.num_recorded < graphs.num_replayed
    for prompted, result, tokens in zip(asked, results, expected, strict=True):
        assert_same(model, prompted, result, tokens)


def test_logits_of_a_padded_step_are_those_of_the_step_without_padding(folders, tmp_path):
    """Three rows padded to four: the same logits, and no key or value of a track that isn't there changes."""
    model = without_embeddings("llama", folders, tmp_path)
    asked = prompts((6,), ("0", "science", "2"))

    def logits(with_graphs):
        seen = []
        with Engine(model, CONFIG) as engine:
            if with_graphs:
                recorded(engine)
            run = engine._runner.run
            engine._runner.run = lambda chunks: seen.append(run(chunks)) or seen[-1]
            engine.generate([p.request(max_tokens=5) for p in asked])
        return {(r.chunk.kv.row, r.chunk.start): r.logits for results in seen for r in results if r.logits is not None}

    ours, expected = logits(True), logits(False)
    assert ours.keys() == expected.keys()
    for place, row in expected.items():
        assert torch.allclose(ours[place], row, atol=1e-4 * float(row.abs().max())), place


def test_the_comparison_sees_a_plan_or_a_batch_that_is_not_filled_again(folders, tmp_path, monkeypatch):
    model = without_embeddings("llama", folders, tmp_path)
    first, second = prompts((6,), ("0", "2"))
    expected = answer(model, second, 6)
    for filled in (StaticPlan, StaticBatch):
        with monkeypatch.context() as patch, Engine(model, CONFIG) as engine:
            recorded(engine)
            engine.generate([first.request(max_tokens=6)])
            patch.setattr(filled, "fill", lambda *args: None)
            (result,) = engine.generate([second.request(max_tokens=6)])
            assert result.token_ids != expected


def test_a_larger_rank_and_new_modules_are_recorded_again(folders, tmp_path):
    base = tiny_model("llama")
    few = random_peft_adapter(base, tmp_path / "few", targets=("q_proj",), seed=1, r=2)
    many = random_peft_adapter(base, tmp_path / "many", targets=linear_targets("llama"), seed=2, r=20)
    model = MultiLoraModel(base)
    model.load_adapter("few", few)
    asked = prompts((6,), ("few", "few"))
    with Engine(model, CONFIG) as engine:
        graphs = recorded(engine)
        engine.generate([p.request(max_tokens=6) for p in asked])
        before = graphs.num_recorded
        engine.generate([p.request(max_tokens=6) for p in asked])
        assert graphs.num_recorded == before  # all shapes are known
        model.load_adapter("few", many, replace=True)
        results = engine.generate([p.request(max_tokens=6) for p in asked])
        assert graphs.num_recorded > before
    for prompted, result in zip(asked, results, strict=True):
        assert_same(model, prompted, result, answer(model, prompted, 6))


@pytest.mark.parametrize("choice", ["embedding", "dora", "residual"])
def test_what_can_not_be_recorded_runs_without_and_says_why(choice, folders, tmp_path, caplog):
    model = make_model("llama", folders("llama"), mixtures=False)
    if choice == "dora":
        options = {"use_dora": True}
        folder = random_peft_adapter(tiny_model("llama"), tmp_path, targets=("q_proj",), seed=3, options=options)
        model.load_adapter("dora", folder)
    add_residuals(model)
    (prompted,) = prompts((6,), ({"embedding": "1", "residual": "ra"}.get(choice, choice),))
    with Engine(model, CONFIG) as engine, caplog.at_level(logging.INFO, "loraplex.engine.worker.cuda_graphs"):
        graphs = recorded(engine)
        (result,) = engine.generate([prompted.request(max_tokens=5)])
        assert graphs.num_replayed == 0
    assert_same(model, prompted, result, answer(model, prompted, 5))
    if choice != "residual":  # whose passes are not offered to the graphs at all
        reason = {"embedding": "adapts an embedding", "dora": "DoRA"}[choice]
        assert sum(reason in message for message in caplog.messages) == 1


def test_a_recording_that_fails_is_not_tried_again(folders, caplog):
    model = make_model("llama", folders("llama"), mixtures=False)
    (prompted,) = prompts((6,), ("0",))
    tried = []

    def fail(step):
        tried.append(step)
        raise RuntimeError("operation not permitted when stream is capturing")

    with Engine(model, CONFIG) as engine, caplog.at_level(logging.INFO, "loraplex.engine.worker.cuda_graphs"):
        engine._runner.use_graphs(fail)
        (result,) = engine.generate([prompted.request(max_tokens=6)])
    assert_same(model, prompted, result, answer(model, prompted, 6))
    assert len(tried) == 1
    assert sum("not permitted" in message for message in caplog.messages) == 1


def test_on_a_cpu_the_setting_has_no_effect_and_is_checked(folders):
    model = make_model("llama", folders("llama"), mixtures=False)
    with Engine(model, CONFIG) as engine:
        assert engine._runner.graphs is None
    with pytest.raises(ConfigError, match="cuda_graphs is 'yes'"):
        EngineConfig(cuda_graphs="yes")


@pytest.mark.parametrize(("num_tokens", "size"), [(1, 1), (3, 4), (9, 16), (16, 16), (17, 32), (64, 64), (65, 80)])
def test_sizes_are_padded_to_few(num_tokens, size):
    assert padded_size(num_tokens) == size
