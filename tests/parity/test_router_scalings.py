"""What routers gate is told as X-LoRA's scalings are: in every way of running, by a loop in float64."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loraplex import (
    ArrowConfig,
    Engine,
    EngineConfig,
    LinearRouterConfig,
    MultiLoraModel,
    Request,
    SamplingParams,
    SpectrConfig,
    XLoraConfig,
)
from loraplex.errors import RequestError, TooLargeError
from loraplex.xlora.scalings.row_scalings import RowScalings
from tests.parity.test_routers import EXPERTS, IDS, Loop, linear_score, load, spectr_score, top_p, write
from tests.tiny_models import linear_targets, random_peft_adapter, tiny_model

NEW = 6
OPTIONS: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


class Told:
    """The loop in float64, and what it gates."""

    def __init__(self, name: str, folders: dict[str, Path], score: Any) -> None:
        self._seen: dict[str, Tensor] = {}

        def noted(x: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], path: str) -> Tensor:
            gates: Tensor = score(x, a, b, path)
            self._seen[path] = gates
            return gates

        self._loop = Loop(name, folders, noted)

    def gates(self, ids: Tensor, layers: Sequence[str]) -> Tensor:  # [tokens, lora_layers, experts]
        self._loop.logits(ids[None])
        return torch.stack([self._seen[path] for path in layers], dim=1)


def spectr_model(folders: dict[str, Path], name: str = "llama") -> MultiLoraModel:
    model = load(name, folders)
    model.create_mixture("spectr", EXPERTS, SpectrConfig(top_k=3, temperature=0.7))
    return model


def assert_told(row: RowScalings, oracle: Told, ids: Sequence[int], what: str) -> None:
    assert row.token_ids == tuple(ids), what
    expected = oracle.gates(torch.tensor(ids), row.layers)
    assert float((row.values.double() - expected).abs().max()) < 1e-4, what


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "phi3"])
def test_gates_of_a_call_are_the_formulas(name: str, tmp_path: Path) -> None:
    folders = dict(write(name, tmp_path))
    model, oracle = spectr_model(folders, name), Told(name, folders, spectr_score)
    plain = model(IDS, adapters=["spectr", None, "0", "spectr:0.5+1", "spectr"]).logits
    out, found = model(IDS, adapters=["spectr", None, "0", "spectr:0.5+1", "spectr"], return_scalings=True)
    assert torch.equal(out.logits, plain)
    assert [len(row) for row in found] == [1, 0, 0, 1, 1]
    for row in (0, 4):
        assert found[row][0].mixture == "spectr"
        assert found[row][0].experts == EXPERTS
        assert_told(found[row][0], oracle, IDS[row].tolist(), f"row {row}")
        assert float((found[row][0].values.sum(dim=-1) - 1).abs().max()) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("rule", ["top_p", "sigmoid"])
def test_gates_of_linear_routers_are_the_formulas(rule: str, tmp_path: Path) -> None:
    folders = dict(write("llama", tmp_path))
    model = load("llama", folders)
    config = LinearRouterConfig(top_p=0.6) if rule == "top_p" else LinearRouterConfig(activation="sigmoid")
    model.create_mixture("linear", EXPERTS, config, seed=5)
    score = linear_score(model.mixtures.get("linear"), top_p if rule == "top_p" else torch.sigmoid)
    oracle = Told("llama", folders, score)
    _, found = model(IDS, adapters=["linear"] * 5, return_scalings=True)
    for row in range(5):
        assert_told(found[row][0], oracle, IDS[row].tolist(), f"row {row}")


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [True, False])
def test_gates_of_generate_leave_padding_out(use_cache: bool, tmp_path: Path) -> None:
    folders = dict(write("llama", tmp_path))
    model, oracle = spectr_model(folders), Told("llama", folders, spectr_score)
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    choices = ["spectr", None, "spectr", "1", "spectr:0.5"]
    out, found = model.generate(IDS, mask, adapters=choices, return_scalings=True, use_cache=use_cache, **OPTIONS)
    assert_told(found[2][0], oracle, out[2, :-1].tolist(), "without padding")
    assert_told(found[0][0], oracle, out[0, 5:-1].tolist(), "behind padding")
    assert found[1] == found[3] == ()


@torch.no_grad()
@pytest.mark.parametrize("max_step_tokens", [8, 64])
def test_gates_of_the_engine_are_the_formulas_and_change_no_answer(max_step_tokens: int, tmp_path: Path) -> None:
    folders = dict(write("llama", tmp_path))
    model, oracle = spectr_model(folders), Told("llama", folders, spectr_score)
    sampling = SamplingParams(max_tokens=NEW, ignore_eos=True)
    rows = IDS.tolist()
    asking = [Request(row, adapters="spectr", sampling=sampling, return_scalings=i != 1) for i, row in enumerate(rows)]
    plain = [Request(row, adapters="spectr", sampling=sampling) for row in rows]
    with Engine(model, EngineConfig(max_step_tokens=max_step_tokens, block_tokens=4)) as engine:
        expected = [result.token_ids for result in engine.generate(plain)]
        results = engine.generate(asking)  # whose prompts are in the prefix cache
        told = engine.generate([asking[0]])[0]
    assert [result.token_ids for result in results] == expected
    assert results[1].scalings is None
    for i in (0, 2, 3, 4):
        assert results[i].scalings is not None
        (scalings,) = results[i].scalings
        assert_told(scalings, oracle, [*rows[i], *results[i].token_ids[:-1]], f"request {i}")
    assert told.scalings is not None
    assert torch.allclose(told.scalings[0].values, results[0].scalings[0].values, atol=1e-6)


@torch.no_grad()
def test_steps_tell_the_gates_of_the_token_that_was_run(tmp_path: Path) -> None:
    model = spectr_model(dict(write("llama", tmp_path)))
    with Engine(model, EngineConfig()) as engine:
        sampling = SamplingParams(max_tokens=NEW, ignore_eos=True)
        request_id = engine.add_request(
            Request(IDS[0].tolist(), adapters="spectr", sampling=sampling, return_scalings=True)
        )
        live = [entry for _ in range(NEW + 2) for delta in engine.step() for entry in delta.scalings]
        result = engine.pop_result(request_id)
    assert result is not None
    assert result.scalings is not None
    means = result.scalings[0].mean_by_token()[len(IDS[0]) - 1 :]
    assert torch.allclose(torch.tensor(live)[:, 0], means, atol=1e-6)


@torch.no_grad()
def test_all_kinds_of_mixtures_are_told_in_the_order_of_the_link(tmp_path: Path) -> None:
    folders = dict(write("llama", tmp_path))
    model, oracle = spectr_model(folders), Told("llama", folders, spectr_score)
    model.create_mixture("xlora", EXPERTS, XLoraConfig(layerwise_scalings=True), seed=1)
    model.create_mixture("arrow", ("1", "3"), ArrowConfig())
    alone = [f"{name}:0" for name in ("xlora", "arrow")]  # weight 0: they are told, and change nothing
    choices = [f"spectr+{alone[0]}+{alone[1]}", f"{alone[0]}+spectr", None, "spectr", f"{alone[1]}+spectr"]
    names = [["spectr", "xlora", "arrow"], ["xlora", "spectr"], [], ["spectr"], ["arrow", "spectr"]]
    out, found = model.generate(IDS, torch.ones_like(IDS), adapters=choices, return_scalings=True, **OPTIONS)
    assert [[one.mixture for one in row] for row in found] == names
    sampling = SamplingParams(max_tokens=NEW, ignore_eos=True)
    requests = [
        Request(row, adapters=choice, sampling=sampling, return_scalings=True)
        for row, choice in zip(IDS.tolist(), choices, strict=True)
    ]
    with Engine(model, EngineConfig()) as engine:
        results = engine.generate(requests)
    for row, result in enumerate(results):
        assert result.scalings is not None
        assert [one.mixture for one in result.scalings] == names[row]
        for own, other in zip(result.scalings, found[row], strict=True):
            assert torch.allclose(own.values, other.values, atol=1e-4), f"row {row}, {own.mixture}"
            if own.mixture == "spectr":
                assert_told(other, oracle, out[row, :-1].tolist(), f"row {row}")


@torch.no_grad()
def test_layers_that_an_expert_lacks_and_the_output_layer(tmp_path: Path) -> None:
    base = tiny_model("llama")
    folders = {
        "all": random_peft_adapter(base, tmp_path / "all", targets=[*linear_targets("llama"), "lm_head"], seed=1),
        "some": random_peft_adapter(base, tmp_path / "some", targets=["q_proj"], seed=2),
    }
    model = load("llama", folders)
    model.create_mixture("m", tuple(folders), SpectrConfig())
    _, found = model(IDS, adapters=["m"] * 5, return_scalings=True)
    values, layers = found[0][0].values, found[0][0].layers
    q = [i for i, path in enumerate(layers) if path.endswith("q_proj")]
    others = [i for i in range(len(layers)) if i not in q]
    assert bool((values[:, others, 1] == 0).all())
    assert bool((values[:, others, 0] == 1).all())
    assert bool(((values[:, q] > 0) & (values[:, q] < 1)).all())
    head = layers.index("lm_head")
    with Engine(model, EngineConfig()) as engine:
        sampling = SamplingParams(max_tokens=3, ignore_eos=True)
        (result,) = engine.generate([Request(IDS[0].tolist(), adapters="m", sampling=sampling, return_scalings=True)])
    assert result.scalings is not None
    told = result.scalings[0].values
    assert bool((told[: len(IDS[0]) - 1, head] == 0).all()), "the output layer doesn't see a prompt's tokens"
    assert bool((told[len(IDS[0]) - 1 :, head, 0] == 1).all())
    assert torch.allclose(told[: len(IDS[0]), :head], values[:, :head], atol=1e-4)


@torch.no_grad()
def test_log_keeps_gates_and_what_can_not_be_told_is_refused(tmp_path: Path) -> None:
    model = spectr_model(dict(write("llama", tmp_path)))
    model.scalings_log.enable()
    model(IDS, adapters=["spectr", *[None] * 4])
    model.scalings_log.disable()
    assert [(entry.mixture, entry.num_tokens) for entry in model.scalings_log.entries()] == [("spectr", 14)]
    with pytest.raises(RequestError, match="several sequences"):
        model.generate(IDS, torch.ones_like(IDS), adapters=["spectr"] * 5, num_beams=2, return_scalings=True, **OPTIONS)
    with Engine(model, EngineConfig()) as engine, pytest.raises(TooLargeError, match="scalings"):
        engine.generate([Request(IDS[0].tolist(), adapters="spectr", return_scalings=True, scalings_budget_bytes=1000)])
