"""Jobs that share batches train as if alone."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loraplex.adapters.config import LoraConfig
from loraplex.adapters.peft.reader import read_adapter
from loraplex.layers.attach import AdaptableModel
from loraplex.training import AdapterJob, TrainConfig, TrainResult, train_adapters
from loraplex.training.adapters.setup import make_states
from loraplex.training.forward.batch import TrainingRow, TrainingSlot, TrainingWeightProvider
from loraplex.training.forward.loss import LossComputer
from tests.tiny_models import tiny_model
from tests.training.tiny_jobs import changed, records, tiny_job, tiny_tokenizer, write_records

BASE = tiny_model("llama")
WIDE = LoraConfig(r=8, lora_alpha=8, target_modules="all-linear")
DROPOUT = LoraConfig(r=4, lora_alpha=8, target_modules=("q_proj", "v_proj"), lora_dropout=0.4)


def train(jobs: list[AdapterJob], output: Path, **options: Any) -> list[TrainResult]:
    config = TrainConfig(output=output, plots=False, **options)
    return train_adapters(BASE, tiny_tokenizer(), jobs=jobs, config=config)


def assert_same_run(result: TrainResult, other: TrainResult) -> None:
    """Equal up to rounding: neighbours change the shapes of matrix products."""
    assert result.train_losses == pytest.approx(other.train_losses, rel=1e-4)
    assert result.eval_losses == pytest.approx(other.eval_losses, rel=1e-4)


def gradients(jobs: list[AdapterJob], rows_of: list[int]) -> list[Tensor]:
    """Every job's gradient after the first step's rows of the jobs in `rows_of`."""
    base = copy.deepcopy(BASE).requires_grad_(False)
    adaptable = AdaptableModel(base)
    states = make_states(jobs, base, adaptable, tiny_tokenizer())
    adaptable.attach([path for state in states for path in state.parameters.paths])
    rows = [TrainingRow(i, i, example) for i in rows_of for example in states[i].data.examples_of_step(0)]
    bank = TrainingWeightProvider([TrainingSlot(state.parameters.slot_weights) for state in states])
    computer = LossComputer(base, len(jobs), tokens_per_forward=2048, share_prefixes=True)
    computer.accumulate_gradients(rows, bank, torch.ones(len(jobs)))
    grads = [state.flat.grad for state in states]
    return [grad.clone() for grad in grads if grad is not None]


def test_gradients_reach_only_a_rows_own_adapter(tmp_path: Path) -> None:
    jobs = [tiny_job(tmp_path, "a"), tiny_job(tmp_path, "b", lora=WIDE)]
    both, alone = gradients(jobs, [0, 1]), gradients(jobs, [1])
    assert not alone[0].any()
    assert both[0].any()
    torch.testing.assert_close(both[1], alone[1], rtol=1e-4, atol=1e-5)


def test_a_job_trains_as_if_alone_and_neighbours_may_finish_before_it(tmp_path: Path) -> None:
    job = tiny_job(tmp_path, "a", max_steps=12)
    short = tiny_job(tmp_path, "b", "text", lora=WIDE, max_steps=5, batch_size=7)
    (alone,) = train([job], tmp_path / "alone")
    together, finished = train([job, short], tmp_path / "together")
    assert_same_run(together, alone)
    assert (together.num_steps, finished.num_steps) == (12, 5)
    assert alone.train_losses[-1] < 0.8 * alone.train_losses[0]


def test_how_forwards_are_cut_does_not_matter(tmp_path: Path) -> None:
    jobs = [tiny_job(tmp_path, "a"), tiny_job(tmp_path, "b", "prompt"), tiny_job(tmp_path, "c", "text")]
    whole = train(jobs, tmp_path / "whole")
    cut = train(jobs, tmp_path / "cut", tokens_per_forward=30)
    unshared = train(jobs, tmp_path / "unshared", share_prefixes=False)
    for result, other, another in zip(whole, cut, unshared, strict=True):
        assert_same_run(result, other)
        assert_same_run(result, another)


def test_accumulated_micro_batches_equal_the_large_batch(tmp_path: Path) -> None:
    large = tiny_job(tmp_path, "a", batch_size=6, epochs=2)  # of 22 records: the last step of an epoch takes 4
    small = changed(large, batch_size=2, gradient_accumulation=3)
    (expected,), (accumulated,) = train([large], tmp_path / "large"), train([small], tmp_path / "small")
    assert expected.num_steps == 8
    assert_same_run(accumulated, expected)


def test_an_epoch_takes_every_record_once_in_an_order_of_its_own(tmp_path: Path) -> None:
    job = tiny_job(tmp_path, "a", batch_size=5, epochs=2)
    (state,) = make_states([job], BASE, AdaptableModel(BASE), tiny_tokenizer())
    places = [
        [e.place for step in steps for e in state.data.examples_of_step(step)] for steps in (range(5), range(5, 10))
    ]
    assert sorted(places[0]) == sorted(places[1]) == sorted(e.place for e in state.data.train)
    assert places[0] != places[1]
    assert not {e.place for e in state.data.held_out} & set(places[0])


def test_dropout_is_the_jobs_own_whatever_its_neighbours_and_the_padding(tmp_path: Path) -> None:
    job = tiny_job(tmp_path, "a", lora=DROPOUT)
    (alone,) = train([job], tmp_path / "alone")
    neighbours = [tiny_job(tmp_path, "b", "text", lora=DROPOUT), tiny_job(tmp_path, "c", lora=WIDE)]
    together = train([neighbours[0], job, neighbours[1]], tmp_path / "together", tokens_per_forward=50)[1]
    assert_same_run(together, alone)
    (without,) = train([replace(job, lora=replace(DROPOUT, lora_dropout=0.0))], tmp_path / "without")
    assert without.train_losses[0] == pytest.approx(alone.train_losses[0])  # lora_b is still zero
    assert without.train_losses[5] != pytest.approx(alone.train_losses[5], rel=1e-3)


def test_held_out_losses_are_computed_without_dropout(tmp_path: Path) -> None:
    job = tiny_job(tmp_path, "a", lora=DROPOUT, max_steps=5)
    (result,) = train([job], tmp_path / "out")
    start = tiny_job(tmp_path, "a", lora=replace(DROPOUT, lora_dropout=0.0), init_from=result.folder, max_steps=1)
    start = changed(start, learning_rate=1e-30, eval_every=1)
    (again,) = train([start], tmp_path / "again")
    assert again.eval_losses[-1] == pytest.approx(result.eval_losses[-1], rel=1e-5)


def test_patience_stops_a_job_and_writes_its_best_weights(tmp_path: Path) -> None:
    wrong = [{**r, "completion": r["completion"][::-1]} for r in records("prompt", 12, seed=9)]
    held_out = write_records(tmp_path / "wrong.jsonl", wrong)  # reversed answers: fitting the data makes them worse
    job = tiny_job(
        tmp_path,
        "a",
        "prompt",
        eval_data=held_out,
        lora=WIDE,
        max_steps=60,
        eval_every=3,
        patience=2,
        learning_rate=1e-2,
    )
    neighbour = tiny_job(tmp_path, "b", max_steps=25)
    stopped, other = train([job, neighbour], tmp_path / "out")
    assert (stopped.finished, other.finished, other.num_steps) == ("patience", "steps", 25)
    assert stopped.best_step is not None
    assert stopped.num_steps == stopped.best_step + 2 * 3 < 60
    best = min(stopped.eval_losses)
    assert stopped.eval_losses[-1] > best

    init = changed(job, init_from=stopped.folder, max_steps=1, eval_every=1, patience=None, learning_rate=1e-30)
    (again,) = train([init], tmp_path / "again")
    assert again.eval_losses[-1] == pytest.approx(best, rel=1e-5)


def test_a_bfloat16_base_trains_float32_parameters(tmp_path: Path) -> None:
    base = tiny_model("llama", dtype=torch.bfloat16)
    config = TrainConfig(output=tmp_path / "out", plots=False)
    job = tiny_job(tmp_path, "a", max_steps=40)
    (result,) = train_adapters(base, tiny_tokenizer(), jobs=[job], config=config)
    assert result.train_losses[-1] < 0.9 * result.train_losses[0]
    layers = read_adapter(result.folder).layers
    assert {weights.lora_a.dtype for weights in layers.values()} == {torch.float32}
    # Smaller than bfloat16 can add to a weight: the updates are kept in float32.
    assert any((w.lora_a.bfloat16().float() != w.lora_a).any() for w in layers.values())
