"""A job that diverges is stopped and told; the others are trained as if it were not there."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from loraplex.adapters.config import LoraConfig
from loraplex.adapters.peft.reader import read_adapter
from loraplex.adapters.weights import Adapter
from loraplex.errors import CheckpointError, ConfigError, TrainingError
from loraplex.training import AdapterJob, TrainConfig, TrainResult, train_adapters
from loraplex.training.core import checks
from loraplex.training.core.train_state import TrainState
from tests.tiny_models import tiny_model
from tests.training.tiny_jobs import changed, records, tiny_job, tiny_tokenizer, write_records

STEPS = 10


@pytest.fixture(autouse=True)
def any_learning_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """The quickest way to diverge, which no user can take."""
    monkeypatch.setattr(checks, "MAX_LEARNING_RATE", 1e39)


def train(jobs: list[AdapterJob], output: Path, **options: Any) -> list[TrainResult]:
    config = TrainConfig(output=output, plots=False, **{"checkpoint_every": 3} | options)
    return train_adapters(tiny_model("llama"), tiny_tokenizer(), jobs=jobs, config=config)


def diverging(folder: Path, **options: Any) -> AdapterJob:
    """Its first step makes its weights so large that the second has no finite loss or gradients."""
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=("lm_head",))  # no norm comes after it
    defaults = {"learning_rate": 1e37, "max_grad_norm": None, "eval_fraction": 0, "lora": lora}
    return tiny_job(folder, "bad", **defaults | options)


def log_of(output: Path, name: str) -> list[dict[str, Any]]:
    text = (output / f"{name}.jsonl").read_text()
    assert "NaN" not in text, "a log that JSON parsers don't read"
    assert "Infinity" not in text, "a log that JSON parsers don't read"
    return [json.loads(line) for line in text.splitlines()]


def test_the_others_finish_and_the_error_has_all_results(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (alone,) = train([tiny_job(tmp_path, "good")], tmp_path / "alone")
    with pytest.raises(
        TrainingError, match=r"job 'bad' diverged in step 2: its (loss|gradients) .*learning_rate \(1e\+37\)"
    ) as e:
        train([tiny_job(tmp_path, "good"), diverging(tmp_path)], tmp_path / "out")
    good, bad = e.value.results
    assert (good.finished, good.num_steps, good.divergence) == ("steps", STEPS, None)
    assert good.train_losses == pytest.approx(alone.train_losses, rel=1e-4)
    written, expected = read_adapter(good.folder), read_adapter(alone.folder)
    for path, weights in expected.layers.items():
        torch.testing.assert_close(written.layers[path].lora_b, weights.lora_b, rtol=1e-2, atol=1e-4)
    assert (bad.finished, bad.num_steps, bad.divergence.step, len(bad.train_losses)) == ("diverged", 1, 2, 1)
    assert str(bad.folder) in str(e.value)
    assert log_of(tmp_path / "out", "bad")[-1]["step"] == 2
    assert log_of(tmp_path / "out", "bad")[-1]["last_good_step"] == bad.divergence.last_good_step == 0
    assert any("'bad' diverged in step 2" in r.getMessage() and r.levelno == logging.ERROR for r in caplog.records)


def test_the_last_good_weights_are_kept_apart_from_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three good steps, the last of which leads to weights without a finite loss: the second step's are kept."""
    job = diverging(tmp_path, learning_rate=5e-3, max_steps=2, schedule="constant")
    (expected,) = train([job], tmp_path / "expected")
    job = changed(job, max_steps=STEPS)

    def explode(self: TrainState, *arguments: Any) -> float:
        if self.progress.step == 2:
            self.optimizer.adamw.param_groups[0]["lr"] = 1e37
        return update(self, *arguments)

    update = TrainState.update
    monkeypatch.setattr(TrainState, "update", explode)
    with pytest.raises(TrainingError) as raised:
        train([job], tmp_path / "out", checkpoint_every=1)
    (bad,) = raised.value.results
    assert (bad.divergence.step, bad.divergence.last_good_step) == (4, 2)
    assert not (tmp_path / "out" / "bad").exists()
    assert bad.folder == tmp_path / "out" / "bad.diverged"
    kept = read_adapter(bad.folder)
    for path, weights in read_adapter(expected.folder).layers.items():
        assert torch.equal(kept.layers[path].lora_b, weights.lora_b)


def test_weights_that_are_not_finite_stop_a_job_even_in_its_last_step(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="diverged in step 1: its weights") as raised:
        train([diverging(tmp_path, learning_rate=3.4e38, weight_decay=1e30, max_steps=1)], tmp_path / "out")
    (bad,) = raised.value.results
    assert all(bool(layer.lora_a.isfinite().all()) for layer in read_adapter(bad.folder).layers.values())


def test_a_held_out_loss_that_is_not_finite_stops_a_job(tmp_path: Path) -> None:
    job = diverging(tmp_path, eval_fraction=0.2, max_steps=1)
    with pytest.raises(TrainingError, match="diverged in step 1: its held-out loss"):
        train([job], tmp_path / "out")


def test_with_patience_the_best_weights_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = diverging(tmp_path, learning_rate=5e-3, eval_fraction=0.2, eval_every=2, patience=9, schedule="constant")
    (expected,) = train([changed(job, max_steps=2, eval_every=2)], tmp_path / "expected")

    def explode(self: TrainState, *arguments: Any) -> float:
        if self.progress.step == 3:
            self.optimizer.adamw.param_groups[0]["lr"] = 1e37
        return update(self, *arguments)

    update = TrainState.update
    monkeypatch.setattr(TrainState, "update", explode)
    with pytest.raises(TrainingError) as raised:
        train([job], tmp_path / "out")
    (bad,) = raised.value.results
    assert bad.divergence.last_good_step == bad.best_step == 2
    for path, weights in read_adapter(expected.folder).layers.items():
        assert torch.equal(read_adapter(bad.folder).layers[path].lora_b, weights.lora_b)


def interrupted_with_a_diverged_job(folder: Path) -> list[AdapterJob]:
    """A checkpoint in folder/out of a run that was stopped after job "bad" had diverged."""
    jobs = [tiny_job(folder, "first"), diverging(folder), tiny_job(folder, "last", "prompt")]

    def interrupt(self: TrainState, *arguments: Any) -> float:
        if self.progress.step == 5:
            raise KeyboardInterrupt
        return update(self, *arguments)

    update = TrainState.update
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(TrainState, "update", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(jobs, folder / "out")
    return jobs


def test_resume_with_the_diverged_job_tells_of_it_again(tmp_path: Path) -> None:
    jobs = interrupted_with_a_diverged_job(tmp_path)
    for _ in range(2):  # the second finds everything finished
        with pytest.raises(TrainingError, match="job 'bad' diverged in step 2") as raised:
            train(jobs, tmp_path / "out")
        assert [result.finished for result in raised.value.results] == ["steps", "diverged", "steps"]
        assert (tmp_path / "out" / "last" / "adapter_config.json").exists()


def test_resume_without_the_diverged_job_gives_what_the_others_would_have_become(tmp_path: Path) -> None:
    first, _, last = interrupted_with_a_diverged_job(tmp_path)
    alone = train([first, last], tmp_path / "alone")
    results = train([first, last], tmp_path / "out")
    assert [result.train_losses for result in results] == [
        pytest.approx(result.train_losses, rel=1e-4) for result in alone
    ]
    assert [entry["step"] for entry in log_of(tmp_path / "out", "last") if "loss" in entry] == list(range(1, STEPS + 1))


def test_resume_with_other_settings_of_the_diverged_job_begins_it_anew(tmp_path: Path) -> None:
    first, bad, last = interrupted_with_a_diverged_job(tmp_path)
    mild = changed(bad, learning_rate=5e-3)
    (alone,) = train([mild], tmp_path / "alone")
    results = train([first, mild, last], tmp_path / "out")
    assert [(result.finished, result.num_steps) for result in results] == [("steps", STEPS)] * 3
    assert results[1].train_losses == pytest.approx(alone.train_losses, rel=1e-4)
    assert [entry["step"] for entry in log_of(tmp_path / "out", "bad")] == list(range(1, STEPS + 1))
    assert train([first, mild, last], tmp_path / "out") == results


def test_jobs_that_did_not_diverge_can_still_not_be_changed_or_left_out(tmp_path: Path) -> None:
    first, bad, last = interrupted_with_a_diverged_job(tmp_path)
    with pytest.raises(CheckpointError, match=r"names was \['first', 'bad', 'last'\]"):
        train([first, bad], tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"jobs\.first\.learning_rate"):
        train([changed(first, learning_rate=1e-4), last], tmp_path / "out")


def test_a_job_may_not_be_called_as_the_place_of_last_good_weights(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'a\.diverged', where 'a' would leave"):
        train([tiny_job(tmp_path, "a"), tiny_job(tmp_path, "a.diverged")], tmp_path / "out")


def zero_adapter(folder: Path) -> Adapter:
    """A and B are 0: no gradient reaches either."""
    (result,) = train([tiny_job(folder, "start", max_steps=1)], folder / "start")
    adapter = read_adapter(result.folder)
    for layer in adapter.layers.values():
        layer.lora_a.zero_()
        layer.lora_b.zero_()
    return adapter


def test_a_dead_adapter_is_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dead = tiny_job(tmp_path, "dead", init_from=zero_adapter(tmp_path))
    caplog.clear()
    alive, result = train([tiny_job(tmp_path, "alive"), dead], tmp_path / "out")
    warnings = [record.getMessage() for record in caplog.records if record.name == "loraplex.training.core.train_state"]
    assert len(warnings) == 1, warnings
    assert "job 'dead': the gradient is exactly 0 since step 1, so it learns nothing: nothing that" in warnings[0]
    assert (alive.zero_gradient_since, result.zero_gradient_since) == (None, 1)


def test_a_dead_adapter_of_a_single_step_is_named_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train([tiny_job(tmp_path, "dead", init_from=zero_adapter(tmp_path), max_steps=1)], tmp_path / "out")
    assert "job 'dead': the gradient is exactly 0 since step 1" in caplog.text


def test_the_command_line_prints_all_jobs_and_ends_with_status_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from loraplex.cli.errors import run
    from loraplex.cli.train import train_app

    base = tmp_path / "base"
    tiny_model("llama").save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    for name in ("good", "bad"):
        write_records(tmp_path / f"{name}.jsonl", records("prompt", 8))
    options = {"steps": 3, "eval-fraction": 0, "targets": "lm_head", "output": tmp_path / "out", "device": "cpu"}
    options |= {"learning-rate": "bad=1e37", "max-grad-norm": "none", "max-length": 128, "model": base}
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    data = [f"--data={name}={tmp_path / name}.jsonl" for name in ("good", "bad")]
    monkeypatch.setattr("sys.argv", ["loraplex", "adapters", "--no-plots", *arguments, *data])
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit) as ended:
        run(train_app)
    assert ended.value.code == 1
    printed = capsys.readouterr()
    assert "good" in printed.out
    assert "diverged" in printed.out
    assert "Error: job 'bad' diverged in step 2" in printed.err
