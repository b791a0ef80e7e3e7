"""Adapters trained as the last of a link: what stands before them acts, and stays as it is."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from loraplex import MultiLoraModel
from loraplex.adapters.peft.reader import read_adapter
from loraplex.adapters.weights import Adapter
from loraplex.errors import BaseModelMismatchError, CheckpointError, ConfigError, UnsupportedAdapterError
from loraplex.residual.layers import AttentionLayers
from loraplex.training import AdapterJob, TrainConfig, train_adapters
from loraplex.training.adapters.setup import make_states
from loraplex.training.data.examples import Example
from loraplex.training.forward import batch as forward
from tests.residual.tiny_residuals import random_linked
from tests.tiny_models import tiny_model
from tests.training.test_residual_jobs import residual_job
from tests.training.tiny_jobs import tiny_job, tiny_tokenizer


@pytest.fixture
def members(tmp_path: Path) -> tuple[Adapter, object]:
    """A LoRA and a residual that change what the base model says."""
    config = TrainConfig(output=tmp_path / "before", plots=False, progress=False)
    (trained,) = train_adapters(
        tiny_model("llama"), tiny_tokenizer(), jobs=[tiny_job(tmp_path, "before", learning_rate=5e-2)], config=config
    )
    return read_adapter(trained.folder), random_linked(AttentionLayers(tiny_model("llama")), 1)


def mean_loss(model: MultiLoraModel, examples: list[Example], link: str) -> float:
    """The mean cross-entropy of all answer tokens of rows that go through a link, one by one."""
    total, count = 0.0, 0
    for example in examples:
        ids = torch.tensor([example.ids])
        with torch.no_grad():
            logits = model(ids, adapters=[link]).logits[0]
        answer = torch.tensor(example.answer)
        total += float(F.cross_entropy(logits[answer - 1].float(), ids[0, answer], reduction="sum"))
        count += len(answer)
    return total / count


@pytest.mark.parametrize("kind", ["lora", "residual"])
@pytest.mark.parametrize("share_prefixes", [True, False])
def test_trained_adapter_is_the_last_of_its_link(
    tmp_path: Path, members: tuple, kind: str, share_prefixes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The held-out loss in training is that of served rows with the link, and not that of the adapter alone."""
    monkeypatch.setattr(forward, "FORWARD_COST", {"cpu": 1})  # share whatever can be shared
    lora, residual = members
    make = tiny_job if kind == "lora" else residual_job
    job: AdapterJob = make(tmp_path, "last", eval_every=10, after=[(lora, 0.7), (residual, 0.5)])
    model = MultiLoraModel(tiny_model("llama"))
    model.load_adapter("lora", lora)
    model.load_residual("residual", residual)
    before = [tensor.clone() for tensor in residual.tensors()]
    plain = tiny_job(tmp_path, "plain")  # beside it in the same batches
    config = TrainConfig(output=tmp_path / "out", plots=False, progress=False, share_prefixes=share_prefixes)
    result, alone = train_adapters(model, tiny_tokenizer(), jobs=[job, plain], config=config)
    held_out = make_states([job], model.base, model.adaptable, tiny_tokenizer(), model.registry.linked.layers)[
        0
    ].data.held_out
    model.load_adapter("last", result.folder)
    assert result.eval_losses[-1] == pytest.approx(mean_loss(model, held_out, "lora:0.7+residual:0.5+last"), rel=1e-4)
    assert result.eval_losses[-1] != pytest.approx(mean_loss(model, held_out, "last"), rel=1e-2)
    assert result.train_losses[-1] < result.train_losses[0]
    assert all(tensor.equal(kept) for tensor, kept in zip(residual.tensors(), before, strict=True))
    (again,) = train_adapters(
        tiny_model("llama"), tiny_tokenizer(), jobs=[plain], config=replace(config, output=tmp_path / "alone")
    )
    assert again.train_losses == pytest.approx(alone.train_losses, rel=1e-3), "a neighbour's link reached other rows"


def test_what_stands_before_belongs_to_the_run(tmp_path: Path, members: tuple) -> None:
    """A checkpoint is not continued with another link."""
    lora, residual = members
    job = tiny_job(tmp_path, "last", after=[(lora, 0.5)])
    config = TrainConfig(output=tmp_path / "out", plots=False, progress=False)
    train_adapters(tiny_model("llama"), tiny_tokenizer(), jobs=[job], config=config)
    for other in ([(lora, 0.6)], [(residual, 0.5)], []):
        with pytest.raises(CheckpointError, match="after"):
            train_adapters(tiny_model("llama"), tiny_tokenizer(), jobs=[replace(job, after=other)], config=config)


def test_members_that_can_not_stand_in_a_link_are_refused(tmp_path: Path, members: tuple) -> None:
    lora, residual = members
    job, config = tiny_job(tmp_path, "last"), TrainConfig(output=tmp_path / "out")
    with pytest.raises(ConfigError, match="after"):
        replace(job, after=[(lora, float("nan"))])
    with pytest.raises(ConfigError, match="after"):
        replace(job, after=[(7, 1.0)])
    dora = Adapter(config=replace(lora.config, use_dora=True), layers=lora.layers)
    with pytest.raises(UnsupportedAdapterError, match=r"after\[1\] of job 'last' is a DoRA"):
        train_adapters(
            tiny_model("llama"), tiny_tokenizer(), jobs=[replace(job, after=[(lora, 1.0), (dora, 1.0)])], config=config
        )
    with pytest.raises(BaseModelMismatchError, match=r"after\[0\]"):
        train_adapters(
            tiny_model("qwen3"), tiny_tokenizer(), jobs=[replace(job, after=[(residual, 1.0)])], config=config
        )
    assert not (tmp_path / "out").exists()
