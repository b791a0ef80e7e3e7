"""LoReFT in training: pyreft's formula and gradients, beside LoRAs in the same batches, and folders that load."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
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
from loraplex.training.adapters.job_state import JobState
from loraplex.training.adapters.reft import TrainableReft
from loraplex.training.adapters.setup import make_states
from loraplex.training.adapters.task import AdapterTask
from loraplex.training.core.distributed import ProcessGroup
from loraplex.training.core.rotation import orthogonal_columns, reflections_of
from loraplex.training.core.trainer import Loss
from loraplex.training.data.examples import Example
from tests.tiny_models import random_peft_adapter, tiny_model
from tests.training.tiny_jobs import pairs, tiny_job, tiny_tokenizer, write_records


def reft_job(folder: Path, name: str, *, positions: str = "f2+l3", **options: Any) -> AdapterJob:
    config = ReftConfig(r=options.pop("r", 3), layers=options.pop("layers", None), positions=parse_positions(positions))
    return tiny_job(folder, name, "prompt", **{"lora": None, "reft": config, **options})


def task_of(jobs: list[AdapterJob], folder: Path, **options: Any) -> AdapterTask:
    base = tiny_model("llama").requires_grad_(False)
    sites = BlockSites(base)
    adaptable = AdaptableModel(base)
    states = make_states(jobs, base, adaptable, tiny_tokenizer(), sites=sites)
    for state in states:
        adaptable.attach([*state.parameters.paths, *state.frozen.paths])
        sites.hook_sites(getattr(state.parameters, "sites", []))
    return AdapterTask(base, states, TrainConfig(output=folder / "out", **options), ProcessGroup(base.device))


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


class PyreftModel:
    """pyreft's interventions on the blocks' outputs at some tokens of the prompt; one record at a time."""

    def __init__(self, state: JobState, places: Callable[[int], list[int]], base: Any = None) -> None:
        assert isinstance(state.parameters, TrainableReft)
        first = state.parameters.interventions().interventions
        self.base = tiny_model("llama").requires_grad_(False) if base is None else base
        self.modules = [
            PyreftIntervention(replace(one, r=one.r.detach(), w=one.w.detach(), b=one.b.detach())) for one in first
        ]
        self._places = places
        self._index: list[int] = []
        for one, own in zip(first, self.modules, strict=True):
            self.base.model.layers[one.block].register_forward_hook(self._hook(own))

    def _hook(self, own: PyreftIntervention) -> Callable[..., Tensor]:
        def run(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            changed = output.clone()
            changed[0, self._index] = own(output[0, self._index])
            return changed

        return run

    def log_probability(self, example: Example, *, intervened: bool = True) -> Tensor:
        """Of the answer's tokens, summed."""
        self._index = self._places(example.answer[0]) if intervened else []
        logits = self.base(torch.tensor([example.ids]), use_cache=False).logits[0]
        at = torch.tensor(example.answer)
        return -nn.functional.cross_entropy(logits[at - 1], torch.tensor(example.ids)[at], reduction="sum")

    def gradient(self, loss: Tensor) -> Tensor:
        loss.backward()
        parts = zip(*(own.gradients() for own in self.modules), strict=True)
        return torch.cat([torch.stack(part).flatten() for part in parts])


def mean_loss(model: PyreftModel, examples: list[Example]) -> Tensor:
    total = sum(-model.log_probability(example) for example in examples)
    return total / sum(len(example.answer) for example in examples)  # type: ignore[return-value]


def first_and_last(num_prompt: int) -> list[int]:
    half = num_prompt // 2
    return [*range(min(2, half)), *range(num_prompt - min(3, half), num_prompt)]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("positions", "places"),
    [("f2+l3", first_and_last), ("prompt", lambda n: list(range(n))), ("l1", lambda n: [n - 1])],
)
def test_gradients_are_those_of_pyrefts_formula(
    tmp_path: Path, positions: str, places: Callable[[int], list[int]], checkpointing: bool
) -> None:
    """In a batch with another LoReFT job and a LoRA, whose rows share their prefixes."""
    jobs = [
        reft_job(tmp_path, "a", positions=positions),
        reft_job(tmp_path, "b", r=2, layers=(1,), positions="l2"),
        tiny_job(tmp_path, "lora"),
    ]
    task = task_of(jobs, tmp_path, gradient_checkpointing=checkpointing)
    state = task.states[0]
    model = PyreftModel(state, places)
    loss = task.accumulate_gradients([0, 1, 2])[0]
    check(loss, state, model, mean_loss(model, state.data.examples_of_step(0)))


def check(found: Loss, state: JobState, model: PyreftModel, expected: Tensor) -> None:
    """A step's loss and gradient against those of pyreft's model."""
    gradient = model.gradient(expected)
    assert found.value == pytest.approx(expected.item(), rel=1e-5)
    assert gradient.norm() > 1e-3
    assert (state.optimizer.gradient - gradient).norm() < 1e-4 * gradient.norm()


def test_gradients_behind_a_lora_that_stays_are_pyrefts_on_the_merged_model(tmp_path: Path) -> None:
    folder = random_peft_adapter(tiny_model("llama"), tmp_path / "lora", targets=("q_proj", "down_proj"))
    merged = PeftModel.from_pretrained(tiny_model("llama"), str(folder)).merge_and_unload().requires_grad_(False)
    task = task_of([reft_job(tmp_path, "a", after=[(folder, 1.0)]), reft_job(tmp_path, "b")], tmp_path)
    state = task.states[0]
    model = PyreftModel(state, first_and_last, merged)
    check(task.accumulate_gradients([0, 1])[0], state, model, mean_loss(model, state.data.examples_of_step(0)))


@pytest.mark.parametrize("fresh", [True, False])
def test_dpo_keeps_to_the_base_model_or_to_the_interventions_that_it_starts_from(fresh: bool, tmp_path: Path) -> None:
    """As TRL does with an adapter that is new, and with one that was trained before."""
    options: dict[str, Any] = {"data": write_records(tmp_path / "pairs.jsonl", pairs()), "loss": "dpo"}
    start = None if fresh else detached(task_of([reft_job(tmp_path, "start")], tmp_path).states[0])
    task = task_of(
        [reft_job(tmp_path, "a", **options, dpo_beta=0.5, init_from=start), reft_job(tmp_path, "b")], tmp_path
    )
    state = task.states[0]
    model = PyreftModel(state, first_and_last)
    found = task.accumulate_gradients([0, 1])[0]
    losses = []
    for pair in state.data.examples_of_step(0):
        assert pair.rejected is not None
        with torch.no_grad():
            before = [model.log_probability(one, intervened=not fresh) for one in pair.both]
        now = [model.log_probability(one) for one in pair.both]
        losses.append(-nn.functional.logsigmoid(0.5 * (now[0] - before[0] - (now[1] - before[1]))))
    expected = torch.stack(losses).mean()
    assert (expected.item() == pytest.approx(math.log(2), abs=1e-6)) is not fresh
    check(found, state, model, expected)


def detached(state: JobState) -> ReftResidual:
    assert isinstance(state.parameters, TrainableReft)
    first = state.parameters.interventions()
    own = tuple(replace(o, r=o.r.detach(), w=o.w.detach(), b=o.b.detach()) for o in first.interventions)
    return replace(first, interventions=own)


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
def served_loss(folder: Path, examples: Any, base: Any = None) -> float:
    """Of the trained folder, through `forward` of a model that loads it."""
    model = MultiLoraModel(tiny_model("llama") if base is None else base)
    model.load_residual("trained", folder)
    total, count = 0.0, 0
    for example in examples:
        request = AttentionRequest(prompt_lengths=[example.answer[0]])
        logits = model(torch.tensor([example.ids]), adapters=["trained"], attention=request).logits[0]
        at = torch.tensor(example.answer)
        total += float(nn.functional.cross_entropy(logits[at - 1], torch.tensor(example.ids)[at], reduction="sum"))
        count += len(at)
    return total / count


def test_a_run_with_other_positions_is_another_run_and_a_trained_folder_goes_on(tmp_path: Path) -> None:
    """What a killed run goes on with: test_every_kind.py."""
    job = reft_job(tmp_path, "a")
    config = TrainConfig(output=tmp_path / "out", plots=False)
    (trained,) = train_adapters(tiny_model("llama"), tiny_tokenizer(), jobs=[job], config=config)
    other = replace(job, reft=replace(job.reft, positions=parse_positions("l1")))
    with pytest.raises(CheckpointError, match="reft"):
        train_adapters(tiny_model("llama"), tiny_tokenizer(), jobs=[other], config=config)
    goes_on = replace(job, init_from=trained.folder, name="b")
    more = TrainConfig(output=tmp_path / "more", plots=False)
    (further,) = train_adapters(tiny_model("llama"), tiny_tokenizer(), jobs=[goes_on], config=more)
    assert further.train_losses[0] < trained.train_losses[0]


def test_jobs_that_can_not_start_are_refused(tmp_path: Path) -> None:
    config = TrainConfig(output=tmp_path / "out")

    def refused(job: AdapterJob, error: type[Exception], names: str) -> None:
        with pytest.raises(error, match=names):
            train_adapters(tiny_model("llama"), tiny_tokenizer(), jobs=[job], config=config)

    refused(reft_job(tmp_path, "a", layers=(2,)), ConfigError, "blocks 0 to 1")
    several = tiny_job(tmp_path, "several", lora=None, reft=ReftConfig(r=2))
    refused(several, DatasetError, "several answers")
    twice = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2
    pair = {"chosen": twice[:2], "rejected": [twice[0], twice[1] | {"content": "c"}, *twice[:2]]}
    data = write_records(tmp_path / "pairs.jsonl", [pair] * 12)
    refused(reft_job(tmp_path, "p", data=data, loss="dpo"), DatasetError, "several answers")
    start = detached(task_of([reft_job(tmp_path, "a")], tmp_path).states[0])
    skewed = replace(start, interventions=tuple(replace(o, r=o.r * 2) for o in start.interventions))
    refused(reft_job(tmp_path, "a", init_from=skewed), ConfigError, "orthogonal")
    refused(reft_job(tmp_path, "a", r=2, init_from=start), ConfigError, "other interventions")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="generated"):
        ReftConfig(positions=parse_positions("generated"))
    with pytest.raises(ConfigError, match="exactly one"):
        replace(reft_job(tmp_path, "a"), reft=None)
