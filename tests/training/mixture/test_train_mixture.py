"""train_mixture as a whole: what it learns, what it leaves alone, what it writes, what it refuses."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from loraplex import MultiLoraModel, XLoraConfig
from loraplex.errors import AdapterNotFoundError, ConfigError, MixtureError, UnsupportedAdapterError
from loraplex.training import train_mixture
from loraplex.training.mixture.data import Sourced
from tests.parity.oracle import assert_close
from tests.tiny_models import linear_targets, random_peft_adapter, tiny_model
from tests.training.mixture.tiny_mixture import (
    NAME,
    tiny_config,
    tiny_data,
    tiny_losses,
    tiny_mixture,
    tiny_sources,
    write_experts,
)
from tests.training.tiny_jobs import changed

LAYERWISE = XLoraConfig(layerwise_scalings=True, xlora_depth=2, xlora_size=16, xlora_dropout_p=0.0)
IDS = torch.tensor([[5, 9, 17, 33, 65, 2, 40, 41]])


def logits(model: MultiLoraModel, name: str = NAME) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(IDS, adapters=[name]).logits
    return out


def gradient(model: MultiLoraModel, folder: Path, **options: Any) -> Tensor:
    """Of the head, by the first step of training."""
    config = tiny_config(folder / "out", eval_fraction=0, **options)
    data = tiny_data(tiny_sources(folder), config)
    state, _, losses = tiny_losses(model, data, config)
    losses.accumulate_gradients(data.examples_of_step(0), 1.0, losses.no_sums(), 0, 0)
    assert state.flat.grad is not None
    return state.flat.grad


def forward_gradient(model: MultiLoraModel, rows: list[Sourced]) -> Tensor:
    """The same by autograd through the model's ordinary forward, one row at a time."""
    head = model.mixtures.get(NAME).head.requires_grad_(True)
    for _, example in rows:
        out = model(torch.tensor([example.inputs]), adapters=[NAME]).logits[0]
        predicted = out[[index - 1 for index in example.answer]]
        F.cross_entropy(predicted, torch.tensor(example.targets), reduction="sum").backward()
    return torch.cat([parameter.grad.reshape(-1) for parameter in head.parameters() if parameter.grad is not None])


def test_learns_and_saves_what_it_learnt_in_both_layouts(tmp_path: Path) -> None:
    sources = tiny_sources(tmp_path)
    for layout in ("peft", "xlora"):
        model = tiny_mixture(tmp_path, LAYERWISE)
        before = logits(model)
        config = tiny_config(tmp_path / layout, max_steps=60, layout=layout, plots=True)
        result = train_mixture(model, NAME, sources, config)
        assert result.eval_losses[-1] < result.eval_losses[0] - 0.03
        assert (logits(model) - before).abs().max() > 1e-2, "the mixture in memory has not changed"
        model.load_mixture("again", result.folder)
        assert_close(logits(model, "again"), logits(model), layout)
        assert (tmp_path / layout / f"{NAME}.png").stat().st_size > 10_000


def test_log_tells_losses_and_mean_scalings_by_source(tmp_path: Path) -> None:
    model = tiny_mixture(tmp_path, LAYERWISE)
    result = train_mixture(model, NAME, tiny_sources(tmp_path), tiny_config(tmp_path / "out", sparsity_weight=0.1))
    entries = [json.loads(line) for line in result.log.read_text().splitlines()]
    steps = [entry for entry in entries if "loss" in entry]
    assert [entry["loss"] for entry in steps] == list(result.train_losses)
    assert all(sum(entry["scalings"].values()) == pytest.approx(1, abs=1e-4) for entry in steps)
    assert all(0 < entry["sparsity"] < 1.1 for entry in steps)
    (last, *_) = [entry for entry in reversed(entries) if "eval_loss" in entry]
    assert last["sources"].keys() == {"messages", "prompt", "text"}
    data = tiny_data(tiny_sources(tmp_path), tiny_config(tmp_path / "out"))
    held = [row.example for row in data.held_out if data.names[row.source] == "prompt"]
    with torch.no_grad():
        reports = [model(torch.tensor([e.inputs]), adapters=[NAME], return_scalings=True)[1][0][0].values for e in held]
    means = torch.cat([report.mean(dim=1) for report in reports]).mean(dim=0)
    assert list(last["sources"]["prompt"]["scalings"].values()) == pytest.approx(means.tolist(), abs=1e-4)


@pytest.mark.parametrize("model_name", ["gpt2", "gemma2", "qwen3"])
def test_gradients_equal_those_through_the_ordinary_forward(tmp_path: Path, model_name: str) -> None:
    targets = linear_targets(model_name)
    write_experts(tmp_path, model_name, [targets, targets[:2], targets])
    model = tiny_mixture(tmp_path, LAYERWISE, model_name=model_name)
    assert_gradients_equal(model, tmp_path)


def test_gradients_through_dora_experts_equal_those_through_the_ordinary_forward(tmp_path: Path) -> None:
    write_experts(tmp_path)
    random_peft_adapter(
        tiny_model("llama"), tmp_path / "expert-1", targets=["q_proj", "down_proj"], options={"use_dora": True}
    )
    assert_gradients_equal(tiny_mixture(tmp_path, LAYERWISE), tmp_path)


def assert_gradients_equal(model: MultiLoraModel, folder: Path) -> None:
    ours = gradient(model, folder)
    config = tiny_config(folder / "out", eval_fraction=0)
    expected = forward_gradient(model, tiny_data(tiny_sources(folder), config).examples_of_step(0))
    assert (ours - expected).norm() < 1e-4 * expected.norm()
    assert expected.norm() > 1e-2


def test_how_rows_are_grouped_changes_nothing(tmp_path: Path) -> None:
    model = tiny_mixture(tmp_path, LAYERWISE)
    whole = gradient(model, tmp_path, tokens_per_forward=100_000)
    for options in ({"tokens_per_forward": 1}, {"batch_size": 2, "gradient_accumulation": 3}):
        assert (gradient(model, tmp_path, **options) - whole).norm() < 1e-4 * whole.norm()


@pytest.mark.parametrize("which", ["xlora_dropout_p", "expert_dropout"])
def test_dropout_acts_in_training_only_and_leaves_the_global_generator_alone(tmp_path: Path, which: str) -> None:
    xlora = replace(LAYERWISE, xlora_dropout_p=0.5 if which == "xlora_dropout_p" else 0.0)
    options = {} if which == "xlora_dropout_p" else {which: 0.5}
    model = tiny_mixture(tmp_path, xlora)
    torch.manual_seed(1)
    expected_draw = torch.rand(3)
    torch.manual_seed(1)
    dropped = gradient(model, tmp_path, **options)
    assert torch.equal(torch.rand(3), expected_draw)
    assert torch.equal(gradient(model, tmp_path, **options), dropped)
    assert not torch.allclose(gradient(model, tmp_path, seed=1, **options), dropped)
    plain = gradient(tiny_mixture(tmp_path, LAYERWISE), tmp_path)
    assert (plain - dropped).norm() > 0.05 * plain.norm()
    config = tiny_config(tmp_path / "out", **options)
    data = tiny_data(tiny_sources(tmp_path), config)
    evaluated = [
        tiny_losses(of, data, config)[2].evaluate(data.held_out).losses
        for of in (model, tiny_mixture(tmp_path, LAYERWISE))
    ]
    assert torch.allclose(*evaluated)


def test_patience_stops_and_writes_the_best_head(tmp_path: Path) -> None:
    model = tiny_mixture(tmp_path)
    options = {"max_steps": 200, "eval_every": 1, "patience": 3, "learning_rate": 0.3, "schedule": "constant"}
    result = train_mixture(model, NAME, tiny_sources(tmp_path), tiny_config(tmp_path / "out", **options))
    assert result.finished == "patience"
    assert result.best_step is not None
    assert result.num_steps == result.best_step + 3 < 200
    config = tiny_config(tmp_path / "out")
    data = tiny_data(tiny_sources(tmp_path), config)
    sums = tiny_losses(model, data, config)[2].evaluate(data.held_out)
    assert float(sums.losses.sum() / sums.num_answers.sum()) == pytest.approx(min(result.eval_losses), rel=1e-5)


def test_experts_in_training_are_saved_and_served(tmp_path: Path) -> None:
    files = [path / "adapter_model.safetensors" for path in write_experts(tmp_path)]
    before = [file.read_bytes() for file in files]
    sources = tiny_sources(tmp_path)
    config = tiny_config(tmp_path / "frozen", max_steps=20)
    frozen = train_mixture(tiny_mixture(tmp_path), NAME, sources, config)
    model = tiny_mixture(tmp_path, XLoraConfig(use_trainable_adapters=True))
    alone = logits(model, "e1")
    result = train_mixture(model, NAME, sources, changed(config, output=tmp_path / "trained"))
    assert result.eval_losses[-1] < frozen.eval_losses[-1] - 0.05
    assert (logits(model, "e1") - alone).abs().max() > 1e-2
    model.load_mixture("again", result.folder)
    assert_close(logits(model, "again"), logits(model), "loaded again")
    assert [file.read_bytes() for file in files] == before, "the experts' own folders were changed"


def test_other_mixtures_keep_their_experts(tmp_path: Path) -> None:
    model = tiny_mixture(tmp_path, XLoraConfig(use_trainable_adapters=True))
    model.create_mixture("other", ["e2", "e0"])
    with pytest.raises(MixtureError, match="'e0', which the mixture 'other' uses too"):
        train_mixture(model, NAME, tiny_sources(tmp_path), tiny_config(tmp_path / "out"))


def test_refuses_what_can_not_be_trained(tmp_path: Path) -> None:
    sources = tiny_sources(tmp_path)

    def train(xlora: XLoraConfig | None = None, name: str = NAME, **options: Any) -> None:
        train_mixture(tiny_mixture(tmp_path, xlora), name, sources, tiny_config(tmp_path / "out", **options))

    with pytest.raises(AdapterNotFoundError, match="mixture 'else' is not loaded"):
        train(name="else")
    with pytest.raises(ConfigError, match="max_length is 999, but the base model has 256 positions"):
        train(max_length=999)
    with pytest.raises(ConfigError, match="defined on scalings that sum to 1"):
        train(XLoraConfig(enable_softmax=False), load_balance_weight=0.1)
    with pytest.raises(UnsupportedAdapterError, match="use_bias is False, but PEFT's heads always have biases"):
        train(XLoraConfig(use_bias=False), layout="peft")
    random_peft_adapter(tiny_model("llama"), tmp_path / "expert-1", targets=["q_proj"], options={"use_dora": True})
    with pytest.raises(UnsupportedAdapterError, match="the expert 'e1' is a DoRA adapter"):
        train(XLoraConfig(use_trainable_adapters=True))
    assert not (tmp_path / "out").exists(), "something was written before everything was checked"
