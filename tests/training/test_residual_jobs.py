"""Linked residuals in training, next to LoRA adapters."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from loraplex import MultiLoraModel
from loraplex.adapters.peft.reader import read_adapter
from loraplex.errors import BaseModelMismatchError, CheckpointError, ConfigError, UnsupportedAdapterError
from loraplex.layers.attach import AdaptableModel
from loraplex.residual.format import read_residual
from loraplex.residual.layers import AttentionLayers
from loraplex.residual.modules import LinkedResidual, ResidualConfig, SteeringVector
from loraplex.training import AdapterJob, StepsConfig, TrainConfig, train_adapters
from loraplex.training.adapters.links import frozen_link
from loraplex.training.adapters.setup import make_states
from loraplex.training.adapters.task import residual_rows
from loraplex.training.forward import batch as forward
from loraplex.training.forward.batch import TrainingRow, TrainingSlot, TrainingWeightProvider, shared_prefix_lengths
from loraplex.training.forward.loss import LossComputer
from tests.residual.tiny_residuals import random_linked
from tests.tiny_models import tiny_model
from tests.training.tiny_jobs import tiny_job, tiny_tokenizer


def residual_job(
    folder: Path, name: str, *, r: int = 4, layers: tuple[int, ...] | None = None, **options
) -> AdapterJob:  # type: ignore[no-untyped-def]
    config = ResidualConfig(r=r, alpha=8.0, layers=layers)
    return tiny_job(folder, name, **{"lora": None, "residual": config, **options})


def test_residuals_learn_next_to_a_lora_as_if_alone(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    jobs = [
        residual_job(tmp_path, "all", max_steps=20, learning_rate=2e-2),
        tiny_job(tmp_path, "lora"),
        residual_job(tmp_path, "last", r=2, layers=(1,)),
    ]
    base = tiny_model("llama")
    together = train_adapters(base, tokenizer, jobs=jobs, config=TrainConfig(output=tmp_path / "together", plots=False))
    assert base.config._attn_implementation == "sdpa", "the base model is given back as it was"
    for job, result in zip(jobs, together, strict=True):
        config = TrainConfig(output=tmp_path / "alone" / job.name, plots=False)
        (alone,) = train_adapters(tiny_model("llama"), tokenizer, jobs=[job], config=config)
        assert alone.train_losses == pytest.approx(result.train_losses, rel=1e-3)
        assert alone.eval_losses == pytest.approx(result.eval_losses, rel=1e-3)
    assert together[0].eval_losses[-1] < 0.95 * together[0].eval_losses[0]
    trained = read_residual(tmp_path / "together" / "last")
    assert isinstance(trained, LinkedResidual)
    assert (trained.config.r, list(trained.layers)) == (2, [1])
    assert trained.layers[1].b.abs().max() > 0
    assert trained.layers[1].head_logits.abs().max() > 0, "the mix of heads doesn't learn"
    assert read_adapter(tmp_path / "together" / "lora").layers


@pytest.mark.parametrize("share_prefixes", [True, False])
def test_gradients_do_not_depend_on_how_rows_are_batched(
    tmp_path: Path, share_prefixes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against single rows without a shared prefix, with three residuals of different ranks and layers."""
    base = tiny_model("llama")
    attention = AttentionLayers(base)
    starts = [random_linked(attention, seed, r=r, at=at) for seed, r, at in ((1, 3, [0, 1]), (2, 5, [1]), (3, 1, [0]))]
    jobs = [
        residual_job(tmp_path, f"job{n}", r=start.config.r, layers=tuple(start.layers))
        for n, start in enumerate(starts)
    ]
    jobs = [
        replace(job, init_from=replace(start, config=job.residual)) for job, start in zip(jobs, starts, strict=True)
    ]
    jobs.append(tiny_job(tmp_path, "lora"))
    states = make_states(jobs, base, AdaptableModel(base), tiny_tokenizer(), attention)
    residuals = residual_rows(states, attention)
    bank = TrainingWeightProvider([TrainingSlot({}) for _ in states])
    rows = [TrainingRow(i, i, example) for i in range(len(jobs)) for example in states[i].data.examples_of_step(0)]
    scales = torch.ones(len(jobs))

    def gradients(per_forward: int, batches: list[list[TrainingRow]], share: bool) -> tuple[torch.Tensor, ...]:
        computer = LossComputer(
            base, len(jobs), tokens_per_forward=per_forward, share_prefixes=share, residuals=residuals
        )
        for state in states[:3]:
            state.flat.grad.zero_()
        sums = sum(computer.accumulate_gradients(batch, bank, scales) for batch in batches)
        return (sums, *(state.flat.grad.clone() for state in states[:3]))

    expected = gradients(10_000, [[row] for row in rows], False)
    assert not share_prefixes or sum(shared_prefix_lengths(rows).values()) > 3, "there is no prefix to share"
    monkeypatch.setattr(forward, "FORWARD_COST", {"cpu": 1})  # share whatever can be shared
    found = gradients(2_000, [rows], share_prefixes)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()))
    assert all(gradient.abs().max() > 0 for gradient in expected[1:])


def test_a_run_with_another_alpha_is_another_run(tmp_path: Path) -> None:
    """What a killed run goes on with: test_every_kind.py."""
    job = residual_job(tmp_path, "a", max_steps=1)
    config = TrainConfig(output=tmp_path / "out", plots=False)
    train_adapters(tiny_model("llama"), tiny_tokenizer(), jobs=[job], config=config)
    other = replace(job, residual=ResidualConfig(r=4, alpha=16.0))
    with pytest.raises(CheckpointError, match="residual"):
        train_adapters(tiny_model("llama"), tiny_tokenizer(), jobs=[other], config=config)


def test_job_trains_exactly_one_kind(tmp_path: Path) -> None:
    job = residual_job(tmp_path, "a")
    with pytest.raises(ConfigError, match="exactly one"):
        replace(job, residual=None)
    with pytest.raises(ConfigError, match="exactly one"):
        replace(job, lora=tiny_job(tmp_path, "b").lora)


def test_residual_jobs_that_can_not_start_are_refused(tmp_path: Path) -> None:
    base = tiny_model("llama")
    config = TrainConfig(output=tmp_path / "out")
    with pytest.raises(ConfigError, match="attention layers 0 to 1"):
        train_adapters(base, tiny_tokenizer(), jobs=[residual_job(tmp_path, "a", layers=(2,))], config=config)
    other = random_linked(AttentionLayers(tiny_model("gpt2")), 1, r=4, alpha=8.0)
    with pytest.raises(BaseModelMismatchError, match="GPT2LMHeadModel"):
        train_adapters(base, tiny_tokenizer(), jobs=[residual_job(tmp_path, "a", init_from=other)], config=config)
    assert not (tmp_path / "out").exists()
    assert base.config._attn_implementation == "sdpa"


def test_interventions_on_blocks_are_refused_before_an_adapter_in_training() -> None:
    model = MultiLoraModel(tiny_model("llama"))
    vector = SteeringVector(vectors={1: torch.zeros(64)}, base=None, site="block")
    job = AdapterJob(
        name="late", data="none", residual=ResidualConfig(r=2), steps=StepsConfig(max_steps=1), after=[(vector, 1.0)]
    )
    with pytest.raises(UnsupportedAdapterError, match="acts on blocks"):
        frozen_link(job, model.registry.adaptable, model.registry.linked.layers, torch.device("cpu"))
