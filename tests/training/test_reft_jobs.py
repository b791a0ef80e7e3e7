"""LoReFT in training: pyreft's formula and gradients, beside LoRAs in the same batches, and folders that load."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

from loraplex import MultiLoraModel
from loraplex.errors import CheckpointError, ConfigError, DatasetError
from loraplex.layers.attach import AdaptableModel
from loraplex.residual import AttentionRequest, ReftResidual, parse_positions
from loraplex.residual.format import read_residual
from loraplex.residual.reft import ReftConfig
from loraplex.residual.sites import BlockSites
from loraplex.training import AdapterJob, TrainConfig, train_adapters
from loraplex.training.adapters.setup import make_states
from loraplex.training.adapters.task import AdapterTask
from loraplex.training.core.distributed import ProcessGroup
from loraplex.training.core.rotation import orthogonal_columns, reflections_of
from loraplex.training.core.trainer import Trainer
from loraplex.training.data.examples import Example
from tests.tiny_models import tiny_model
from tests.training.tiny_jobs import tiny_job, tiny_tokenizer


def reft_job(folder: Path, name: str, *, positions: str = "f2+l3", **options: Any) -> AdapterJob:
    config = ReftConfig(r=options.pop("r", 3), layers=options.pop("layers", None), positions=parse_positions(positions))
    return tiny_job(folder, name, "prompt", **{"lora": None, "reft": config, **options})


def task_of(jobs: list[AdapterJob], folder: Path) -> AdapterTask:
    base = tiny_model("llama").requires_grad_(False)
    sites = BlockSites(base)
    adaptable = AdaptableModel(base)
    states = make_states(jobs, base, adaptable, tiny_tokenizer(), sites=sites)
    for state in states:
        adaptable.attach(state.parameters.paths)
        sites.hook_sites(getattr(state.parameters, "sites", []))
    return AdapterTask(base, states, TrainConfig(output=folder / "out"), ProcessGroup(base.device))


class PyreftIntervention(nn.Module):
    """pyreft's LoreftIntervention, with its rotation's parametrization, from the same first weights."""

    def __init__(self, first: Any) -> None:
        super().__init__()
        rank, hidden = first.r.shape
        rotation = nn.Linear(rank, hidden, bias=False)
        with torch.no_grad():
            rotation.weight.copy_(first.r.t())
        self.rotate = orthogonal(rotation, orthogonal_map="householder", use_trivialization=False)
        self.source = nn.Linear(hidden, rank)
        with torch.no_grad():
            self.source.weight.copy_(first.w)
            self.source.bias.copy_(first.b)

    def forward(self, base: Tensor) -> Tensor:
        rotation = self.rotate.weight  # [hidden, rank]
        return base + (self.source(base) - base @ rotation) @ rotation.t()

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        return (
            self.rotate.parametrizations.weight.original.grad.tril(-1),
            self.source.weight.grad,
            self.source.bias.grad,
        )


def pyreft_gradient(
    interventions: list[Any], examples: list[Example], places: Callable[[int], list[int]]
) -> tuple[Tensor, float]:
    """One record after the other; pyreft's interventions on the blocks' outputs at some tokens of the prompt."""
    base = tiny_model("llama").requires_grad_(False)
    modules = [PyreftIntervention(first) for first in interventions]
    index: list[int] = []

    def hook(own: PyreftIntervention) -> Callable[..., Tensor]:
        def run(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            changed = output.clone()
            changed[0, index] = own(output[0, index])
            return changed

        return run

    for first, own in zip(interventions, modules, strict=True):
        base.model.layers[first.block].register_forward_hook(hook(own))
    total, count = torch.zeros(()), sum(len(example.answer) for example in examples)
    for example in examples:
        index[:] = places(example.answer[0])
        logits = base(torch.tensor([example.ids]), use_cache=False).logits[0]
        at = torch.tensor(example.answer)
        loss = nn.functional.cross_entropy(logits[at - 1], torch.tensor(example.ids)[at], reduction="sum")
        total = total + loss / count
    total.backward()
    parts = zip(*(own.gradients() for own in modules), strict=True)
    return torch.cat([torch.stack(part).flatten() for part in parts]), float(total)


def first_and_last(num_prompt: int) -> list[int]:
    half = num_prompt // 2
    return [*range(min(2, half)), *range(num_prompt - min(3, half), num_prompt)]


@pytest.mark.parametrize(
    ("positions", "places"),
    [("f2+l3", first_and_last), ("prompt", lambda n: list(range(n))), ("l1", lambda n: [n - 1])],
)
def test_gradients_are_those_of_pyrefts_formula(
    tmp_path: Path, positions: str, places: Callable[[int], list[int]]
) -> None:
    """In a batch with another LoReFT job and a LoRA, whose rows share their prefixes."""
    jobs = [
        reft_job(tmp_path, "a", positions=positions),
        reft_job(tmp_path, "b", r=2, layers=(1,), positions="l2"),
        tiny_job(tmp_path, "lora"),
    ]
    task = task_of(jobs, tmp_path)
    state = task.states[0]
    first = state.parameters.interventions().interventions
    loss = task.accumulate_gradients([0, 1, 2])[0]
    expected, value = pyreft_gradient(
        [replace(one, r=one.r.detach(), w=one.w.detach(), b=one.b.detach()) for one in first],
        list(state.data.examples_of_step(0)),
        places,
    )
    assert loss.value == pytest.approx(value, rel=1e-5)
    assert expected.norm() > 1e-3
    assert (state.optimizer.gradient - expected).norm() < 1e-4 * expected.norm()


def test_rotations_are_torchs_and_stay_orthogonal() -> None:
    draw = torch.Generator().manual_seed(0)
    columns = torch.linalg.qr(torch.randn(5, 16, 3, generator=draw))[0]
    factors, signs = reflections_of(columns)
    assert torch.allclose(orthogonal_columns(factors, signs), columns, atol=1e-6)
    moved = orthogonal_columns(factors + torch.randn(factors.shape, generator=draw), signs)
    assert torch.allclose(moved.mT @ moved, torch.eye(3).expand(5, 3, 3), atol=1e-5)
    assert (moved - columns).abs().max() > 0.1
    module = orthogonal(nn.Linear(3, 16, bias=False), orthogonal_map="householder", use_trivialization=False)
    raw = module.parametrizations.weight.original.detach()
    assert torch.allclose(orthogonal_columns(raw, raw.diagonal().sign()), module.weight, atol=1e-6)


def test_loreft_learns_next_to_others_as_if_alone_and_its_folder_gives_the_losses(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    jobs = [
        reft_job(tmp_path, "all", max_steps=20, learning_rate=2e-2),
        tiny_job(tmp_path, "lora"),
        reft_job(tmp_path, "last", r=2, layers=(1,), positions="l4"),
    ]
    base = tiny_model("llama")
    together = train_adapters(base, tokenizer, jobs=jobs, config=TrainConfig(output=tmp_path / "together", plots=False))
    for job, result in zip(jobs, together, strict=True):
        config = TrainConfig(output=tmp_path / "alone" / job.name, plots=False)
        (alone,) = train_adapters(tiny_model("llama"), tokenizer, jobs=[job], config=config)
        assert alone.train_losses == pytest.approx(result.train_losses, rel=1e-3)
    assert together[0].eval_losses[-1] < 0.95 * together[0].eval_losses[0]
    trained = read_residual(tmp_path / "together" / "all")
    assert isinstance(trained, ReftResidual)
    assert trained.end_tokens == (3,)
    for one in trained.interventions:
        assert torch.allclose(one.r @ one.r.t(), torch.eye(3), atol=1e-5)
    held_out = make_states([jobs[0]], base, AdaptableModel(base), tokenizer, sites=BlockSites(base))[0].data.held_out
    assert served_loss(tmp_path / "together" / "all", held_out) == pytest.approx(together[0].eval_losses[-1], rel=1e-4)


@torch.no_grad()
def served_loss(folder: Path, examples: Any) -> float:
    """Of the trained folder, through `forward` of a model that loads it."""
    model = MultiLoraModel(tiny_model("llama"))
    model.load_residual("trained", folder)
    total, count = 0.0, 0
    for example in examples:
        request = AttentionRequest(prompt_lengths=[example.answer[0]])
        logits = model(torch.tensor([example.ids]), adapters=["trained"], attention=request).logits[0]
        at = torch.tensor(example.answer)
        total += float(nn.functional.cross_entropy(logits[at - 1], torch.tensor(example.ids)[at], reduction="sum"))
        count += len(at)
    return total / count


def test_resumed_run_ends_where_it_would_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_tokenizer()
    job = reft_job(tmp_path, "a")
    whole = TrainConfig(output=tmp_path / "whole", plots=False)
    (expected,) = train_adapters(tiny_model("llama"), tokenizer, jobs=[job], config=whole)

    class Killed(Exception):
        pass

    def kill(states: Any) -> None:
        if states[0].progress.step == 5:
            raise Killed

    parts = TrainConfig(output=tmp_path / "parts", plots=False, checkpoint_every=5)
    run = Trainer.run
    monkeypatch.setattr(Trainer, "run", lambda self, on_step, stop: run(self, kill, stop))
    with pytest.raises(Killed):
        train_adapters(tiny_model("llama"), tokenizer, jobs=[job], config=parts)
    monkeypatch.undo()
    other = replace(job, reft=replace(job.reft, positions=parse_positions("l1")))
    with pytest.raises(CheckpointError, match="reft"):
        train_adapters(tiny_model("llama"), tokenizer, jobs=[other], config=parts)
    (resumed,) = train_adapters(tiny_model("llama"), tokenizer, jobs=[job], config=parts)
    assert resumed.train_losses == expected.train_losses
    first, second = (read_residual(result.folder).interventions for result in (expected, resumed))
    assert all(a.r.equal(b.r) and a.w.equal(b.w) for a, b in zip(first, second, strict=True))
    goes_on = replace(job, init_from=resumed.folder, name="b")
    more = TrainConfig(output=tmp_path / "more", plots=False)
    (further,) = train_adapters(tiny_model("llama"), tokenizer, jobs=[goes_on], config=more)
    assert further.train_losses[0] < expected.train_losses[0]


def test_jobs_that_can_not_start_are_refused(tmp_path: Path) -> None:
    config = TrainConfig(output=tmp_path / "out")

    def refused(job: AdapterJob, error: type[Exception], names: str) -> None:
        with pytest.raises(error, match=names):
            train_adapters(tiny_model("llama"), tiny_tokenizer(), jobs=[job], config=config)

    refused(reft_job(tmp_path, "a", layers=(2,)), ConfigError, "blocks 0 to 1")
    several = tiny_job(tmp_path, "several", lora=None, reft=ReftConfig(r=2))
    refused(several, DatasetError, "several answers")
    start = task_of([reft_job(tmp_path, "a")], tmp_path).states[0].parameters.interventions()
    skewed = replace(start, interventions=tuple(replace(o, r=o.r.detach() * 2) for o in start.interventions))
    refused(reft_job(tmp_path, "a", init_from=skewed), ConfigError, "orthogonal")
    refused(reft_job(tmp_path, "a", r=2, init_from=start), ConfigError, "other interventions")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="generated"):
        ReftConfig(positions=parse_positions("generated"))
    with pytest.raises(ConfigError, match="exactly one"):
        replace(reft_job(tmp_path, "a"), reft=None)
