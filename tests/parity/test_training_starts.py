"""DoRA, rsLoRA, LoRA+, PiSSA and OLoRA, all in one batch, against PEFT, which trains each alone with its own code."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from transformers import PreTrainedModel, get_scheduler

from loraplex.adapters.config import LoraConfig
from loraplex.adapters.peft.reader import read_adapter
from loraplex.errors import ConfigError, UnsupportedAdapterError
from loraplex.training import AdapterJob, TrainConfig, TrainResult, train_adapters
from loraplex.training.adapters.data import load_job_data
from tests.parity.test_training_peft import check_written_adapter, padded
from tests.tiny_models import random_peft_adapter, tiny_model
from tests.training.tiny_jobs import tiny_job, tiny_tokenizer

STEPS = 20
TARGETS = ("q_proj", "o_proj", "down_proj")
# By job: what PEFT's LoraConfig says besides, and the job's own options.
STARTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dora": ({"use_dora": True}, {}),
    "dora plus": ({"use_dora": True, "use_rslora": True}, {"lora_plus_ratio": 8.0}),
    "rslora": ({"use_rslora": True}, {}),
    "plus": ({}, {"lora_plus_ratio": 16.0, "weight_decay": 0.1}),
    "pissa": ({"init_lora_weights": "pissa"}, {"start": "pissa"}),
    "pissa rslora": ({"init_lora_weights": "pissa", "use_rslora": True}, {"start": "pissa"}),
    "olora": ({"init_lora_weights": "olora"}, {"start": "olora"}),
}


def job_of(name: str, model: PreTrainedModel, folder: Path) -> AdapterJob:
    settings, options = STARTS[name]
    known = {key: value for key, value in settings.items() if key != "init_lora_weights"}
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, **known)
    options = {"max_steps": STEPS, "learning_rate": 2e-3, "batch_size": 4, "lora": lora} | options
    if "start" not in options:
        start = random_peft_adapter(model, folder / f"start {name}", targets=TARGETS, options=known)
        options |= {"init_from": start, "lora": read_adapter(start).config}
    return tiny_job(folder, name.replace(" ", "-"), **options)


def peft_model(name: str, model: PreTrainedModel, job: AdapterJob) -> PeftModel:
    if job.init_from is not None:
        return PeftModel.from_pretrained(copy.deepcopy(model), str(job.init_from), is_trainable=True).eval()
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(TARGETS), **STARTS[name][0])
    return peft.get_peft_model(copy.deepcopy(model), config).eval()


def train_with_peft(name: str, model: PreTrainedModel, job: AdapterJob) -> tuple[list[float], PeftModel]:
    adapted = peft_model(name, model, job)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    rate, decay = job.optimizer.learning_rate, job.optimizer.weight_decay
    if job.lora_plus_ratio == 1:
        optimizer = torch.optim.AdamW(trained, rate, weight_decay=decay)
    else:
        options = {"loraplus_lr_ratio": job.lora_plus_ratio, "loraplus_weight_decay": decay, "weight_decay": decay}
        optimizer = create_loraplus_optimizer(adapted, torch.optim.AdamW, lr=rate, **options)
    scheduler = get_scheduler("cosine", optimizer, 0, STEPS)
    data = load_job_data(job, tiny_tokenizer(), 128)
    losses = []
    for step in range(STEPS):
        loss = adapted(**padded(data.examples_of_step(step))).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, adapted


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[AdapterJob, TrainResult]]:
    folder, model = tmp_path_factory.mktemp("starts"), tiny_model("llama")
    jobs = [job_of(name, model, folder) for name in STARTS]
    config = TrainConfig(output=folder / "out", plots=False, prompt_centroids=False, tokens_per_forward=400)
    results = train_adapters(copy.deepcopy(model), tiny_tokenizer(), jobs=jobs, config=config)
    return {name: (job, result) for name, job, result in zip(STARTS, jobs, results, strict=True)}


@pytest.mark.parametrize("name", STARTS)
def test_a_start_in_a_mixed_batch_follows_peft_training_it_alone(
    name: str, runs: dict[str, tuple[AdapterJob, TrainResult]]
) -> None:
    job, result = runs[name]
    model = tiny_model("llama")
    expected, adapted = train_with_peft(name, model, job)
    assert expected[-1] < 0.95 * expected[0], f"{name} learns nothing, so the curves show nothing"
    actual = torch.tensor(result.train_losses)
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=1e-4, atol=0, msg=name)
    check_written_adapter(model, result.folder, adapted, job)


def test_what_is_written_of_a_pissa_is_a_plain_lora_of_twice_the_rank(
    runs: dict[str, tuple[AdapterJob, TrainResult]],
) -> None:
    config = read_adapter(runs["pissa"][1].folder).config
    assert (config.r, config.scaling_of("q_proj")) == (8, 2.0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"start": "loftq"}, "start is 'loftq'; choose one of"),
        ({"start": "pissa", "gates_before_user": 0}, "gates_before_user is not 1"),
        ({"lora_plus_ratio": 0}, "lora_plus_ratio is 0; it must be a number above 0"),
    ],
)
def test_refuses_starts_that_mean_nothing(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        tiny_job(tmp_path, "a", **options)


def test_refuses_dora_with_dropout(tmp_path: Path) -> None:
    lora = LoraConfig(r=2, target_modules=("q_proj",), use_dora=True, lora_dropout=0.1)
    with pytest.raises(UnsupportedAdapterError, match=r"use_dora is True and lora_dropout is 0\.1"):
        tiny_job(tmp_path, "a", lora=lora)


@pytest.mark.parametrize(
    ("options", "lora"),
    [({"start": "pissa"}, {}), ({"lora_plus_ratio": 4.0}, {}), ({}, {"use_dora": True})],
)
def test_refuses_embeddings_where_they_are_not_defined(
    options: dict[str, Any], lora: dict[str, Any], tmp_path: Path
) -> None:
    job = tiny_job(tmp_path, "a", lora=LoraConfig(r=2, target_modules=("embed_tokens",), **lora), **options)
    config = TrainConfig(output=tmp_path / "out", plots=False)
    with pytest.raises(ConfigError, match="embed_tokens"):
        train_adapters(tiny_model("llama"), tiny_tokenizer(), jobs=[job], config=config)


def test_dora_on_modules_with_biases_and_transposed_weights_follows_peft(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    start = random_peft_adapter(model, tmp_path / "start", targets=("c_attn", "c_fc"), options={"use_dora": True})
    options = {"max_steps": STEPS, "learning_rate": 2e-3, "init_from": start, "lora": read_adapter(start).config}
    job = tiny_job(tmp_path, "dora", **options)
    config = TrainConfig(output=tmp_path / "out", plots=False, prompt_centroids=False)
    (result,) = train_adapters(copy.deepcopy(model), tiny_tokenizer(), jobs=[job], config=config)
    expected, _ = train_with_peft("dora", model, job)
    assert expected[-1] < 0.95 * expected[0]
    torch.testing.assert_close(torch.tensor(result.train_losses), torch.tensor(expected), rtol=1e-4, atol=0)
