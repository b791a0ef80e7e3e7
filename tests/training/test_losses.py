"""DPO and rewards, in one batch with cross-entropy, against losses written out in float64 on PEFT's models."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor
from transformers import get_scheduler

from loraplex.adapters.config import LoraConfig
from loraplex.adapters.peft.reader import read_adapter
from loraplex.errors import ConfigError, DatasetError
from loraplex.training import AdapterJob, TrainConfig, TrainResult, train_adapters
from loraplex.training.adapters.data import JobData, load_job_data
from loraplex.training.data.examples import Example
from loraplex.training.data.preferences import parse_pair, read_rewarded
from tests.tiny_models import random_peft_adapter, tiny_model
from tests.training.tiny_jobs import pairs, rewarded, tiny_job, tiny_tokenizer, write_records

STEPS, BETA = 12, 0.5
TARGETS = ("q_proj", "v_proj", "up_proj")


def jobs_in(folder: Path) -> list[AdapterJob]:
    """DPO from trained-looking starts, a LoRA and a DoRA, rewards, and plain cross-entropy beside them."""
    model = tiny_model("llama")
    start = random_peft_adapter(model, folder / "start", targets=TARGETS, seed=3)
    dora = random_peft_adapter(model, folder / "dora", targets=TARGETS, seed=4, options={"use_dora": True})
    options: dict[str, Any] = {"max_steps": STEPS, "batch_size": 3, "eval_every": 4, "learning_rate": 2e-3}
    dpo = {**options, "data": write_records(folder / "pairs.jsonl", pairs()), "loss": "dpo", "dpo_beta": BETA}
    reward = {**options, "data": write_records(folder / "rewarded.jsonl", rewarded()), "loss": "reward"}
    lora = read_adapter(start).config
    return [
        tiny_job(folder, "dpo", **dpo, lora=lora, init_from=start, gradient_accumulation=2),
        tiny_job(folder, "reward", **reward, lora=lora, init_from=start),
        tiny_job(folder, "plain", **options, lora=lora, init_from=start),
        tiny_job(folder, "dora", **dpo, lora=read_adapter(dora).config, init_from=dora),
    ]


def log_probability(model: PeftModel, example: Example) -> Tensor:
    """Of the answer's tokens, summed."""
    ids = torch.tensor([example.ids])
    log_probabilities = model(ids[:, :-1]).logits.log_softmax(-1)
    return sum(log_probabilities[0, index - 1, example.ids[index]] for index in example.answer)  # type: ignore[return-value]


def dpo_loss(policy: PeftModel, reference: PeftModel, examples: list[Example]) -> Tensor:
    losses = []
    for pair in examples:
        assert pair.rejected is not None, "a pair has two answers"
        with torch.no_grad():
            before = log_probability(reference, pair) - log_probability(reference, pair.rejected)
        now = log_probability(policy, pair) - log_probability(policy, pair.rejected)
        losses.append(-F.logsigmoid(BETA * (now - before)))
    return torch.stack(losses).mean()


def reward_loss(policy: PeftModel, reference: PeftModel, examples: list[Example]) -> Tensor:
    total = sum(-example.weight * log_probability(policy, example) for example in examples)
    return total / sum(len(example.answer) for example in examples)  # type: ignore[operator, return-value]


def by_hand(job: AdapterJob, data: JobData) -> tuple[list[float], float]:
    """The losses of each step in float64, and the held-out loss after the last."""
    model = tiny_model("llama").double()
    policy = PeftModel.from_pretrained(copy.deepcopy(model), str(job.init_from), is_trainable=True).double().eval()
    reference = PeftModel.from_pretrained(copy.deepcopy(model), str(job.init_from)).double().eval()
    loss_of = dpo_loss if job.loss == "dpo" else reward_loss
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, job.optimizer.learning_rate, weight_decay=0)
    scheduler = get_scheduler("cosine", optimizer, 0, STEPS)
    losses = []
    for step in range(STEPS):
        loss = loss_of(policy, reference, data.examples_of_step(step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    with torch.no_grad():
        return losses, loss_of(policy, reference, list(data.held_out)).item()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[AdapterJob], list[TrainResult]]:
    folder = tmp_path_factory.mktemp("losses")
    jobs = jobs_in(folder)
    config = TrainConfig(output=folder / "out", plots=False, tokens_per_forward=100)
    return jobs, train_adapters(tiny_model("llama"), tiny_tokenizer(), jobs=jobs, config=config)


@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_curves_equal_those_of_the_loss_written_out_in_float64(
    number: int, run: tuple[list[AdapterJob], list[TrainResult]]
) -> None:
    jobs, results = run
    job, result = jobs[number], results[number]
    expected, held_out = by_hand(job, load_job_data(job, tiny_tokenizer(), 128))
    assert result.train_losses == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert result.eval_losses[-1] == pytest.approx(held_out, rel=1e-4, abs=1e-6)
    assert expected[-1] < expected[0] or job.loss == "reward"


def test_the_log_has_margins_and_how_many_pairs_are_preferred(
    run: tuple[list[AdapterJob], list[TrainResult]],
) -> None:
    log = [json.loads(line) for line in run[1][0].log.read_text().splitlines()]
    assert log[0]["margin"] == pytest.approx(0, abs=1e-4), "before the first step policy and reference are one"
    assert log[-1]["accuracy"] in (0.0, 1.0)  # one pair is held out
    last = [entry for entry in log if "loss" in entry][-1]
    assert last["loss"] < 0.69
    assert last["accuracy"] > 0.5


def test_dpo_with_dropout_draws_the_same_in_both_of_its_passes_whatever_its_neighbours(tmp_path: Path) -> None:
    data = write_records(tmp_path / "pairs.jsonl", pairs())
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, lora_dropout=0.3)
    job = tiny_job(tmp_path, "a", data=data, loss="dpo", lora=lora, max_steps=6, eval_fraction=0)
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    config = TrainConfig(output=tmp_path / "whole", plots=False)
    (whole,) = train_adapters(model, tokenizer, jobs=[job], config=config)
    # The second pass must draw what the first drew: the weights of a pair are those of its rows.
    assert whole.train_losses[0] == pytest.approx(0.6931, abs=1e-3)
    neighbour = tiny_job(tmp_path, "b", "text")
    config = TrainConfig(output=tmp_path / "both", plots=False)
    together, _ = train_adapters(model, tokenizer, jobs=[job, neighbour], config=config)
    assert together.train_losses == pytest.approx(whole.train_losses, rel=1e-4)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"prompt": "a", "chosen": "b"}, "has no chosen and rejected answer"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "are the same"),
        ({"prompt": 3, "chosen": "b", "rejected": "c"}, "prompt is 3"),
        ({"prompt": "a", "chosen": "", "rejected": "c"}, r"\(chosen\): completion is empty"),
        (
            {
                "prompt": [{"role": "user", "content": "a"}],
                "chosen": [{"role": "user", "content": "b"}],
                "rejected": [],
            },
            "no message has the role",
        ),
    ],
)
def test_refuses_records_that_are_no_pairs(record: dict[str, Any], said: str) -> None:
    with pytest.raises(DatasetError, match=said):
        parse_pair(json.dumps(record), "file:1")


def test_refuses_records_without_a_reward(tmp_path: Path) -> None:
    data = write_records(tmp_path / "data.jsonl", [{"text": "a", "reward": 1}, {"text": "b", "reward": "much"}])
    with pytest.raises(DatasetError, match=r"data.jsonl:2: reward is 'much'; it must be a finite number"):
        read_rewarded(data)


def test_refuses_settings_of_losses_that_mean_nothing(tmp_path: Path) -> None:
    for options, said in (
        ({"loss": "ppo"}, "loss is 'ppo'; choose one of"),
        ({"dpo_beta": 0}, "dpo_beta is 0"),
        ({"turns": "first"}, "turns is 'first'"),
        ({"loss": "dpo", "best_by": "exact_match"}, "which pairs don't have"),
    ):
        with pytest.raises(ConfigError, match=said):
            tiny_job(tmp_path, "a", **options)


def test_only_the_answers_after_the_prompt_count_in_a_pair() -> None:
    before = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    record = {"prompt": before} | {
        key: [{"role": "assistant", "content": answer}] for key, answer in (("chosen", "d"), ("rejected", "e"))
    }
    chosen, rejected = parse_pair(json.dumps(record), "file:1")
    assert chosen.first_counted == rejected.first_counted == 3
