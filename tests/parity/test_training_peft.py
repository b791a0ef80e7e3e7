"""Training many adapters in one batch against PEFT, which trains each alone."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, get_scheduler

from loraplex.adapters.peft.reader import read_adapter
from loraplex.layers.attach import AdaptableModel
from loraplex.training import AdapterJob, TrainConfig, train_adapters
from loraplex.training.adapters.data import load_job_data
from loraplex.training.adapters.setup import make_states
from loraplex.training.data.examples import Example
from loraplex.training.forward.batch import TrainingRow, TrainingSlot, TrainingWeightProvider
from loraplex.training.forward.loss import LossComputer
from loraplex.training.forward.probe import can_share_prefixes
from tests.tiny_models import TINY_CAUSAL_MODELS, embedding_target, linear_targets, random_peft_adapter, tiny_model
from tests.training.tiny_jobs import records, tiny_job, tiny_tokenizer, write_records

STEPS = 50
SETTINGS: dict[str, dict[str, Any]] = {
    "attention": {"targets": ("q_proj", "v_proj"), "r": 4, "lora_alpha": 8, "form": "messages", "schedule": "cosine"},
    "everything": {"targets": "all-linear", "r": 8, "lora_alpha": 4, "form": "prompt", "schedule": "linear"},
    "embedding": {
        "targets": ("embed_tokens", "o_proj"),
        "r": 2,
        "lora_alpha": 2,
        "form": "text",
        "schedule": "constant",
    },
    "output": {"targets": ("lm_head", "up_proj"), "r": 3, "lora_alpha": 6, "form": "messages", "schedule": "linear"},
}


def parity_jobs(model: PreTrainedModel, folder: Path) -> list[AdapterJob]:
    """Four jobs that differ in everything, each from a random PEFT adapter."""
    jobs = []
    for number, (name, settings) in enumerate(SETTINGS.items()):
        options = {key: settings[key] for key in ("targets", "r", "lora_alpha")}
        start = random_peft_adapter(model, folder / f"start-{name}", seed=number, **options)
        job = tiny_job(
            folder,
            name,
            settings["form"],
            lora=read_adapter(start).config,
            init_from=start,
            schedule=settings["schedule"],
            learning_rate=[1e-3, 5e-4, 2e-3, 1e-3][number],
            warmup_steps=number * 3,
            weight_decay=[0.0, 0.1, 0.0, 0.01][number],
            max_grad_norm=[1.0, 0.5, None, 1.0][number],
            batch_size=3 + number,
            max_steps=STEPS,
            seed=number,
        )
        jobs.append(job)
    return jobs


def padded(examples: list[Example]) -> dict[str, Tensor]:
    """What a usual training loop gives to the model: inputs, mask, and labels of -100 where nothing counts."""
    longest = max(len(example.ids) for example in examples)
    ids, mask, labels = (torch.zeros(len(examples), longest, dtype=torch.int64) for _ in range(3))
    labels -= 100
    for row, example in enumerate(examples):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
        mask[row, : len(example.ids)] = 1
        for index in example.answer:
            labels[row, index] = example.ids[index]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def peft_model(model: PreTrainedModel, job: AdapterJob) -> PeftModel:
    assert job.init_from is not None, "parity jobs start from a PEFT folder"
    return PeftModel.from_pretrained(copy.deepcopy(model), str(job.init_from), is_trainable=True).eval()


def train_with_peft(model: PreTrainedModel, job: AdapterJob) -> tuple[list[float], PeftModel]:
    """The job alone, in a plain loop."""
    adapted = peft_model(model, job)
    data = load_job_data(job, tiny_tokenizer(), 128)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, job.optimizer.learning_rate, weight_decay=job.optimizer.weight_decay)
    schedule = {"constant": "constant_with_warmup"}.get(job.optimizer.schedule, job.optimizer.schedule)
    scheduler = get_scheduler(schedule, optimizer, job.optimizer.warmup_steps, STEPS)
    losses = []
    for step in range(STEPS):
        loss = adapted(**padded(data.examples_of_step(step))).loss
        loss.backward()
        if job.optimizer.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(trained, job.optimizer.max_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, adapted


def peft_gradients(model: PreTrainedModel, job: AdapterJob) -> dict[str, Tensor]:
    """Gradients of the first step, under (module path, factor)."""
    adapted = peft_model(model, job)
    data = load_job_data(job, tiny_tokenizer(), 128)
    adapted(**padded(data.examples_of_step(0))).loss.backward()
    gradients = {}
    for name, parameter in adapted.named_parameters():
        if parameter.grad is not None:
            path, factor = name.removeprefix("base_model.model.").split(".lora_")
            gradients[f"{path}.{'b' if 'B' in factor else 'a'}"] = parameter.grad
    return gradients


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama")


def assert_gradients_equal_pefts(model: PreTrainedModel, jobs: list[AdapterJob], *, share_prefixes: bool) -> None:
    """The first step of all jobs in one batch against PEFT, one job at a time."""
    base = copy.deepcopy(model)
    adaptable = AdaptableModel(base)
    states = make_states(jobs, base, adaptable, tiny_tokenizer())
    adaptable.attach([path for state in states for path in state.parameters.paths])
    rows, scales = [], torch.zeros(len(jobs))
    for index, state in enumerate(states):
        examples = state.data.examples_of_step(0)
        rows += [TrainingRow(index, index, example) for example in examples]
        scales[index] = 1 / sum(len(example.answer) for example in examples)
    bank = TrainingWeightProvider([TrainingSlot(state.parameters.slot_weights) for state in states])
    computer = LossComputer(base, len(jobs), tokens_per_forward=120, share_prefixes=share_prefixes)
    computer.accumulate_gradients(rows, bank, scales)

    paths = {index: path for path, index in adaptable.module_index.items()}
    for job, state in zip(jobs, states, strict=True):
        expected = peft_gradients(model, job)
        largest = max(gradient.abs().max().item() for gradient in expected.values())
        seen = set()
        for index, weights in state.parameters.slot_weights.items():
            assert weights.lora_b.grad is not None, f"{job.name}: {paths[index]} has no gradient"
            for factor, gradient in {"a": weights.lora_a.grad, "b": weights.lora_b.grad.t()}.items():
                key = f"{paths[index]}.{factor}"
                seen.add(key)
                label = f"{job.name} {key}"
                torch.testing.assert_close(gradient, expected[key], rtol=1e-4, atol=1e-4 * largest, msg=label)
        assert seen == expected.keys()


@pytest.mark.parametrize("share_prefixes", [True, False])
def test_gradients_of_a_mixed_batch_equal_those_of_each_job_alone_in_peft(
    model: PreTrainedModel, tmp_path: Path, share_prefixes: bool
) -> None:
    jobs = parity_jobs(model, tmp_path)
    assert_gradients_equal_pefts(model, jobs, share_prefixes=share_prefixes)


@pytest.mark.parametrize("name", TINY_CAUSAL_MODELS)
def test_gradients_equal_pefts_in_every_module_of_many_architectures(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    jobs = []
    for number, targets in enumerate([(*linear_targets(name), embedding_target(name)), linear_targets(name)[:1]]):
        start = random_peft_adapter(model, tmp_path / str(number), targets=targets, seed=number, r=2 + number)
        jobs.append(tiny_job(tmp_path, f"job{number}", lora=read_adapter(start).config, init_from=start))
    assert_gradients_equal_pefts(model, jobs, share_prefixes=can_share_prefixes(model))


def test_fifty_steps_of_four_jobs_follow_peft_training_each_alone(model: PreTrainedModel, tmp_path: Path) -> None:
    jobs = parity_jobs(model, tmp_path)
    config = TrainConfig(output=tmp_path / "out", plots=False)
    results = train_adapters(copy.deepcopy(model), tiny_tokenizer(), jobs=jobs, config=config)
    for job, result in zip(jobs, results, strict=True):
        expected, adapted = train_with_peft(model, job)
        assert expected[-1] < 0.9 * expected[0], f"{job.name} learns nothing, so the curves show nothing"
        torch.testing.assert_close(
            torch.tensor(result.train_losses), torch.tensor(expected), rtol=1e-4, atol=0, msg=job.name
        )
        check_written_adapter(model, result.folder, adapted, job)


def check_written_adapter(model: PreTrainedModel, folder: Path, adapted: PeftModel, job: AdapterJob) -> None:
    """PEFT loads what was written, and it gives the logits of the adapter that PEFT trained."""
    loaded = PeftModel.from_pretrained(copy.deepcopy(model), str(folder)).eval()
    batch = padded(load_job_data(job, tiny_tokenizer(), 128).examples_of_step(0))
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with torch.no_grad():
        actual, expected = loaded(**inputs).logits, adapted(**inputs).logits
    span = (expected.max() - expected.min()).item()
    assert (actual - expected).abs().max().item() < 1e-3 * span, job.name


def test_alora_gradients_equal_pefts(model: PreTrainedModel, tmp_path: Path) -> None:
    invocation = tuple(tiny_tokenizer()("=", add_special_tokens=False)["input_ids"])
    options = {"alora_invocation_tokens": list(invocation), "task_type": "CAUSAL_LM"}  # PEFT looks only there
    start = random_peft_adapter(model, tmp_path / "start", targets=("q_proj", "v_proj", "up_proj"), options=options)
    data = write_records(
        tmp_path / "data.jsonl", [{**r, "prompt": "say " + r["prompt"]} for r in records("prompt", 24)]
    )
    job = tiny_job(
        tmp_path, "alora", lora=read_adapter(start).config, init_from=start, max_steps=12, max_grad_norm=None
    )
    job = replace(job, data=data)
    config = TrainConfig(output=tmp_path / "out", plots=False)
    plain = tiny_job(tmp_path, "plain", max_steps=12)  # a neighbour whose rows are adapted from the first token on
    alora, _ = train_adapters(copy.deepcopy(model), tiny_tokenizer(), jobs=[job, plain], config=config)

    adapted = peft_model(model, job)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, job.optimizer.learning_rate, weight_decay=0)
    scheduler = get_scheduler("cosine", optimizer, 0, 12)
    data_of_job = load_job_data(job, tiny_tokenizer(), 128)
    for step in range(12):
        loss = adapted(**padded(data_of_job.examples_of_step(step))).loss
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        assert alora.train_losses[step] == pytest.approx(loss.item(), rel=1e-4), f"step {step}"
