"""Training a mixture against PEFT's X-LoRA in a plain loop: gradients, 50 steps, and what stays frozen."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import get_scheduler

from loraplex import MultiLoraModel, XLoraConfig
from loraplex.training import train_mixture
from loraplex.training.data.examples import Example
from tests.parity.xlora_oracle import peft_xlora
from tests.tiny_models import tiny_model
from tests.training.mixture.tiny_mixture import (
    NAME,
    tiny_base,
    tiny_config,
    tiny_data,
    tiny_losses,
    tiny_sources,
    write_experts,
)

STEPS = 50
GRID = {
    "linear": XLoraConfig(),
    "linear, layerwise": XLoraConfig(layerwise_scalings=True, softmax_temperature=0.5),
    "deep": XLoraConfig(xlora_depth=2, xlora_size=32, xlora_dropout_p=0.0, global_scaling_weight=2.0),
    "deep, layerwise": XLoraConfig(xlora_depth=2, xlora_size=32, xlora_dropout_p=0.0, layerwise_scalings=True),
    "top 2": XLoraConfig(layerwise_scalings=True, top_k_lora=2, enable_softmax_topk=True),
    "pass value": XLoraConfig(xlora_depth=2, xlora_size=16, xlora_dropout_p=0.0, scaling_pass_value=0.5),
    "no softmax": XLoraConfig(enable_softmax=False, scaling_pass_value=None),
}
OPTIONS: dict[str, Any] = {
    "max_steps": STEPS,
    "warmup_steps": 5,
    "schedule": "linear",
    "weight_decay": 0.01,
    "max_grad_norm": 0.5,
    "learning_rate": 5e-3,
    "eval_fraction": 0,
}
ATTENTION_ONLY = (("q_proj", "v_proj"), ("q_proj", "k_proj", "o_proj"), ("up_proj", "down_proj", "q_proj"))


def both_sides(folder: Path, config: XLoraConfig, targets: Any = None) -> tuple[MultiLoraModel, peft.PeftModel]:
    """Our mixture and PEFT's, with the same experts and the same head."""
    experts = write_experts(folder) if targets is None else write_experts(folder, targets=targets)
    named = {str(i): path for i, path in enumerate(experts)}
    oracle = peft_xlora(tiny_model("llama"), named, config, seed=3)
    model = tiny_base(folder)
    for name, path in named.items():
        model.load_adapter(name, path)
    model.create_mixture(NAME, list(named), config)
    model.mixtures.get(NAME).head.load_state_dict(oracle.base_model.internal_xlora_classifier.state_dict())
    return model, oracle


def padded(examples: list[Example]) -> dict[str, Tensor]:
    longest = max(len(example.ids) for example in examples)
    ids, mask, labels = (torch.zeros(len(examples), longest, dtype=torch.int64) for _ in range(3))
    labels -= 100
    for row, example in enumerate(examples):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
        mask[row, : len(example.ids)] = 1
        for index in example.answer:
            labels[row, index] = example.ids[index]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def trained_by_peft(oracle: peft.PeftModel) -> dict[str, torch.nn.Parameter]:
    return dict(oracle.base_model.internal_xlora_classifier.named_parameters())


def assert_relative(ours: Tensor, theirs: Tensor, name: str, tolerance: float = 1e-4) -> None:
    error = (ours - theirs).norm() / theirs.norm()
    assert error < tolerance, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("name", GRID)
def test_head_gradients_equal_pefts(tmp_path: Path, name: str) -> None:
    model, oracle = both_sides(tmp_path, GRID[name])
    config = tiny_config(tmp_path / "out", **OPTIONS)
    data = tiny_data(tiny_sources(tmp_path), config)
    state, _, losses = tiny_losses(model, data, config)
    rows = data.examples_of_step(0)
    num_answers = sum(len(row.example.answer) for row in rows)
    sums = losses.no_sums()
    losses.accumulate_gradients(rows, 1 / num_answers, sums, 0, 0)

    loss = oracle(**padded([row.example for row in rows]), use_cache=False).loss
    loss.backward()
    assert float(sums.losses.sum()) / num_answers == pytest.approx(loss.item(), rel=1e-5)
    ours = dict(state.head.named_parameters())
    theirs = trained_by_peft(oracle)
    assert ours.keys() == theirs.keys()
    for key, parameter in theirs.items():
        assert parameter.grad is not None
        assert parameter.grad.norm() > 1e-6, "the oracle has no gradient"
        assert_relative(ours[key].grad, parameter.grad, key)
    assert not any(p.grad is not None for p in model.base.parameters()), "the base model got gradients"


@pytest.mark.parametrize("name", ["linear", "linear, layerwise", "deep", "deep, layerwise"])
def test_50_steps_equal_pefts(tmp_path: Path, name: str) -> None:
    model, oracle = both_sides(tmp_path, GRID[name], targets=ATTENTION_ONLY)
    base = {key: value.clone() for key, value in model.base.state_dict().items()}
    slots = [model.store.version(str(i)).prepared for i in range(3)]
    experts = [w.lora_a.clone() for prepared in slots if prepared is not None for w in prepared.layers.values()]
    config = tiny_config(tmp_path / "out", **OPTIONS)
    sources = tiny_sources(tmp_path)
    result = train_mixture(model, NAME, sources, config)
    assert_losses_equal_pefts(tmp_path, oracle, list(trained_by_peft(oracle).values()), result.train_losses)
    for key, parameter in trained_by_peft(oracle).items():
        assert_relative(dict(model.mixtures.get(NAME).head.named_parameters())[key], parameter, key, 1e-3)
    assert all(torch.equal(value, base[key]) for key, value in model.base.state_dict().items())
    after = [w.lora_a for prepared in slots if prepared is not None for w in prepared.layers.values()]
    assert len(after) == len(experts) > 0
    assert all(torch.equal(now, before) for now, before in zip(after, experts, strict=True))


def assert_losses_equal_pefts(
    folder: Path, oracle: peft.PeftModel, trained: list[torch.nn.Parameter], losses: tuple[float, ...]
) -> None:
    """Train PEFT's model in the usual loop on the same records."""
    config = tiny_config(folder / "out", **OPTIONS)
    data = tiny_data(tiny_sources(folder), config)
    optimizer = torch.optim.AdamW(trained, config.optimizer.learning_rate, weight_decay=config.optimizer.weight_decay)
    scheduler = get_scheduler("linear", optimizer, config.optimizer.warmup_steps, STEPS)
    theirs = []
    for step in range(STEPS):
        loss = oracle(**padded([row.example for row in data.examples_of_step(step)]), use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, config.optimizer.max_grad_norm or 0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        theirs.append(loss.item())
    assert losses == pytest.approx(theirs, rel=1e-4)
    assert sum(theirs[-10:]) < 0.98 * sum(theirs[:10]), "PEFT has not learnt anything, so the comparison says little"


def test_gradients_and_steps_of_experts_in_training_equal_pefts(tmp_path: Path) -> None:
    xlora = XLoraConfig(layerwise_scalings=True, use_trainable_adapters=True)
    model, oracle = both_sides(tmp_path, xlora, targets=ATTENTION_ONLY)
    config = tiny_config(tmp_path / "out", **OPTIONS)
    sources = tiny_sources(tmp_path)
    data = tiny_data(sources, config)
    state, _, losses = tiny_losses(model, data, config)
    rows = data.examples_of_step(0)
    num_answers = sum(len(row.example.answer) for row in rows)
    losses.accumulate_gradients(rows, 1 / num_answers, losses.no_sums(), 0, 0)
    oracle(**padded([row.example for row in rows]), use_cache=False).loss.backward()
    theirs = {name: p for name, p in oracle.named_parameters() if ".lora_A." in name or ".lora_B." in name}
    factors = iter([factor for of_expert in state.parameters.factors.values() for factor in of_expert])
    checked = 0
    for expert, adapter in state.parameters.adapters.items():
        for path in adapter.layers:
            for factor in ("lora_A", "lora_B"):
                ours = next(factors).grad
                (expected,) = [
                    p.grad for name, p in theirs.items() if name.endswith(f"{path}.{factor}.{expert}.weight")
                ]
                assert ours is not None
                assert expected is not None
                assert_relative(ours, expected if factor == "lora_A" else expected.t(), f"{path}.{factor} of {expert}")
                checked += 1
    assert checked == len(theirs) == 2 * 2 * 8  # blocks, factors, targets of all experts

    oracle.zero_grad()
    result = train_mixture(model, NAME, sources, config)
    trained = [*trained_by_peft(oracle).values(), *theirs.values()]
    assert_losses_equal_pefts(tmp_path, oracle, trained, result.train_losses)
