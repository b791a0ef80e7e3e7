"""A run that was stopped goes on exactly where it would have been."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from loraplex.errors import CheckpointError
from loraplex.training import TrainConfig, TrainResult, train_adapters
from loraplex.training.core.checkpoint import FILE
from loraplex.training.core.stopping import stop_requests
from loraplex.training.core.train_state import TrainState
from tests.tiny_models import tiny_model
from tests.training.mixture.tiny_mixture import NAME
from tests.training.routers.tiny_router import NAME as ROUTER
from tests.training.run_tiny import RUNS, STEPS, jobs_in, run
from tests.training.tiny_jobs import changed, tiny_job, tiny_tokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def interrupts_raise() -> Iterator[None]:
    """What runs in the background of a shell ignores them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def assert_identical(results: list[TrainResult], others: list[TrainResult]) -> None:
    """Bit for bit: losses, logs, and every file of adapters or mixtures."""
    for result, other in zip(results, others, strict=True):
        assert result.train_losses == other.train_losses
        assert result.eval_losses == other.eval_losses
        assert (result.num_steps, result.finished, result.best_step) == (
            other.num_steps,
            other.finished,
            other.best_step,
        )
        assert result.log.read_bytes() == other.log.read_bytes()
        files, expected = content(result.folder), content(other.folder)
        assert any(name.endswith("adapter_model.safetensors") for name in files)
        assert files.keys() == expected.keys()
        assert [name for name in files if files[name] != expected[name]] == []


def content(folder: Path) -> dict[str, bytes]:
    """Every file by its path; a mixture's settings name its own folder."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes().replace(bytes(folder), b"") for path in files}


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Raise KeyboardInterrupt when job "b", or the mixture, has gathered the gradients of its step `step`."""
    update = TrainState.update

    def interrupted(self: TrainState, *arguments: Any) -> float:
        if self.name in ("b", NAME, ROUTER) and self.progress.step == step:
            raise KeyboardInterrupt
        return update(self, *arguments)

    monkeypatch.setattr(TrainState, "update", interrupted)


@pytest.mark.parametrize(
    ("kind", "step"),
    [
        ("adapters", 3),
        pytest.param("adapters", 27, marks=pytest.mark.slow),
        pytest.param("mixture", 3, marks=pytest.mark.slow),
        pytest.param("mixture", 27, marks=pytest.mark.slow),
        pytest.param("mixture and experts", 20, marks=pytest.mark.slow),
        ("router", 20),
        pytest.param("router and experts", 27, marks=pytest.mark.slow),
    ],
)
def test_interrupted_run_resumes_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, step: int
) -> None:
    train = RUNS[kind]
    expected = train(tmp_path, tmp_path / "whole")
    with monkeypatch.context() as patched:
        stop_at(patched, step)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, tmp_path / "out")
    assert len((tmp_path / "out" / expected[0].log.name).read_text().splitlines()) >= step
    assert_identical(train(tmp_path, tmp_path / "out"), expected)


@pytest.mark.parametrize(
    ("kind", "first"),
    [
        ("adapters", "a"),
        pytest.param("mixture", NAME, marks=pytest.mark.slow),
        pytest.param("router", ROUTER, marks=pytest.mark.slow),
    ],
)
def test_killed_process_resumes_bit_for_bit(tmp_path: Path, kind: str, first: str) -> None:
    process = start(tmp_path, kind)
    log = tmp_path / "out" / f"{first}.jsonl"
    wait_for_lines(process, log, STEPS // 2)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    lines = log.read_bytes().count(b"\n")
    assert not (tmp_path / "out" / first).exists(), "killed too late"

    resumed = RUNS[kind](tmp_path, tmp_path / "out")
    assert log.read_bytes().count(b"\n") > lines
    assert_identical(resumed, RUNS[kind](tmp_path, tmp_path / "whole"))


@pytest.mark.parametrize(
    ("kind", "number", "error"),
    [
        ("adapters", signal.SIGTERM, SystemExit),
        ("mixture", signal.SIGINT, KeyboardInterrupt),
        pytest.param("router", signal.SIGTERM, SystemExit, marks=pytest.mark.slow),
    ],
)
def test_run_that_is_told_to_stop_saves_its_step_and_resumes_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, number: signal.Signals, error: type[BaseException]
) -> None:
    train = RUNS[kind]
    with monkeypatch.context() as patched:
        signal_in_step(patched, 20, number)
        with pytest.raises(error) as stopped:
            train(tmp_path, tmp_path / "out")
    assert getattr(stopped.value, "code", 143) == 143
    # Nothing that was computed is lost: the checkpoint, written every 6 steps, knows of every line of the log.
    kept, jobs = checkpoint_of(tmp_path / "out")
    names = {"adapters": "abc", "mixture": [NAME], "router": [ROUTER]}[kind]
    assert kept == [(tmp_path / "out" / f"{name}.jsonl").stat().st_size for name in names]
    assert jobs[0]["progress"]["step"] == 20
    assert_identical(train(tmp_path, tmp_path / "out"), train(tmp_path, tmp_path / "whole"))


def signal_in_step(monkeypatch: pytest.MonkeyPatch, step: int, number: signal.Signals) -> None:
    """Let the signal come while job "a", or the mixture, makes its step `step`."""
    update = TrainState.update

    def told(self: TrainState, *arguments: Any) -> float:
        if self.name in ("a", NAME, ROUTER) and self.progress.step == step - 1:
            signal.raise_signal(number)
        return update(self, *arguments)

    monkeypatch.setattr(TrainState, "update", told)


@pytest.mark.slow
def test_process_that_gets_sigterm_ends_with_the_status_of_one(tmp_path: Path) -> None:
    process = start(tmp_path, "adapters")
    wait_for_lines(process, tmp_path / "out" / "a.jsonl", STEPS // 2)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 143
    kept, jobs = checkpoint_of(tmp_path / "out")
    assert 0 < jobs[0]["progress"]["step"] < STEPS, "the run was over before it was told to stop: it tests nothing"
    assert kept[0] == (tmp_path / "out" / "a.jsonl").stat().st_size


def checkpoint_of(folder: Path) -> tuple[list[int], list[dict[str, Any]]]:
    """The bytes of each log that the checkpoint counts, and the jobs' counters."""
    with safe_open(folder / FILE, framework="pt") as file:
        found = json.loads(file.metadata()["loraplex_training"])
    return found["log_bytes"], found["jobs"]


def start(folder: Path, kind: str) -> "subprocess.Popen[bytes]":
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    command = [sys.executable, "-m", "tests.training.run_tiny", str(folder), kind]
    return subprocess.Popen(command, cwd=ROOT, env=environment)


def wait_for_lines(process: "subprocess.Popen[bytes]", log: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_bytes().count(b"\n") > count):
        assert process.poll() is None, "the process ended before it could be stopped"
        assert time.monotonic() < deadline, "the process has not come half way"
        time.sleep(0.002)


def test_a_program_that_takes_the_signals_itself_keeps_them() -> None:
    mine = signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        taken = signal.getsignal(signal.SIGTERM)
        with stop_requests() as stop:
            assert signal.getsignal(signal.SIGTERM) is taken
            signal.raise_signal(signal.SIGINT)
            assert stop.signal == signal.SIGINT
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, mine)


@pytest.mark.parametrize("kind", ["adapters", "mixture"])
def test_finished_run_returns_its_results_again_and_restores_what_was_lost(tmp_path: Path, kind: str) -> None:
    first = RUNS[kind](tmp_path, tmp_path / "out")
    before = content(first[0].folder)
    shutil.rmtree(first[0].folder)
    assert RUNS[kind](tmp_path, tmp_path / "out") == first
    assert content(first[0].folder) == before


def test_resume_false_starts_over(tmp_path: Path) -> None:
    job = tiny_job(tmp_path, "a", max_steps=3)
    config = TrainConfig(output=tmp_path / "out", plots=False)
    train_adapters(tiny_model("llama"), tiny_tokenizer(), jobs=[job], config=config)
    job, config = changed(job, max_steps=2), replace(config, resume=False)
    (result,) = train_adapters(tiny_model("llama"), tiny_tokenizer(), jobs=[job], config=config)
    assert result.num_steps == 2
    entries = [json.loads(line) for line in result.log.read_text().splitlines()]
    assert [entry["step"] for entry in entries if "loss" in entry] == [1, 2]


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"learning_rate": 1e-4}, r"jobs\.b\.learning_rate was 0\.005 and is 0\.0001"),
        ({"seed": 99}, r"jobs\.b\.seed was"),
        ({"schedule": "cosine"}, r"jobs\.b\.schedule was 'linear' and is 'cosine'"),
        ({"max_steps": 41}, r"jobs\.b\.max_steps was 40 and is 41"),
    ],
)
def test_checkpoint_of_another_configuration_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], difference: str
) -> None:
    stop_and_check(tmp_path, monkeypatch, difference, lambda jobs: [jobs[0], changed(jobs[1], **change), jobs[2]])


def test_checkpoint_of_other_jobs_data_or_adapters_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_and_check(tmp_path, monkeypatch, r"names was \['a', 'b', 'c'\] and is \['a', 'b'\]", lambda jobs: jobs[:2])
    lora = replace(jobs_in(tmp_path)[1].lora, r=8)
    resume_refused(
        tmp_path, r"jobs\.b\.lora\.r was 4 and is 8", lambda jobs: [jobs[0], replace(jobs[1], lora=lora), jobs[2]]
    )
    longer = tmp_path / "longer.jsonl"
    longer.write_text((tmp_path / "b.jsonl").read_text() + '{"text": "one more"}\n')
    resume_refused(
        tmp_path, r"jobs\.b\.content of data was", lambda jobs: [jobs[0], replace(jobs[1], data=longer), jobs[2]]
    )


def test_checkpoint_of_another_base_model_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    job = tiny_job(tmp_path, "a", max_steps=2)
    config = TrainConfig(output=tmp_path / "out", plots=False)
    train_adapters(tiny_model("llama"), tiny_tokenizer(), jobs=[job], config=config)
    with pytest.raises(CheckpointError, match=r"base model\.weights was"):
        train_adapters(tiny_model("llama", seed=1), tiny_tokenizer(), jobs=[job], config=config)
    checkpoint = tmp_path / "out" / "checkpoint.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="not a checkpoint that can be read"):
        train_adapters(tiny_model("llama"), tiny_tokenizer(), jobs=[job], config=config)


def stop_and_check(folder: Path, monkeypatch: pytest.MonkeyPatch, difference: str, change: Any) -> None:
    with monkeypatch.context() as patched:
        stop_at(patched, 8)
        with pytest.raises(KeyboardInterrupt):
            run(folder, folder / "out")
    resume_refused(folder, difference, change)


def resume_refused(folder: Path, difference: str, change: Any) -> None:
    config = TrainConfig(output=folder / "out", plots=False, tokens_per_forward=150)
    with pytest.raises(CheckpointError, match=difference):
        train_adapters(tiny_model("llama"), tiny_tokenizer(), jobs=change(jobs_in(folder)), config=config)
