"""Trackers get every number of the logs under the adapters' names, whatever becomes of the run."""

import json
from pathlib import Path
from typing import Any

import pytest

from loraplex.errors import ConfigError, MissingExtraError
from loraplex.training import TrainConfig, train_adapters
from loraplex.training.core import trackers
from loraplex.training.core.trainer import Trainer
from tests.tiny_models import tiny_model
from tests.training.tiny_jobs import tiny_job, tiny_tokenizer


class Recorder:
    """Stands in for a tracker of accelerate's."""

    def __init__(self) -> None:
        self.tracker = self
        self.settings: dict[str, Any] = {}
        self.logged: list[tuple[int | None, dict[str, Any]]] = []
        self.axes: dict[str, str] = {}
        self.is_finished = False

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.settings = values

    def log(self, values: dict[str, Any], step: int | None) -> None:
        self.logged.append((step, values))

    def define_metric(self, name: str, *, step_metric: str) -> None:
        self.axes[name] = step_metric

    def finish(self) -> None:
        self.is_finished = True


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> dict[str, Recorder]:
    started = {name: Recorder() for name in ("tensorboard", "wandb", "mlflow")}
    monkeypatch.setattr(trackers, "_start", lambda name, output, first_step: started[name])
    monkeypatch.setattr(trackers, "require_extra", lambda extra, what: None)
    return started


def test_every_number_of_the_logs_goes_to_the_trackers(tmp_path: Path, recorders: dict[str, Recorder]) -> None:
    (tmp_path / "team").mkdir()
    jobs = [tiny_job(tmp_path, "team/a", max_steps=6), tiny_job(tmp_path, "b", "text", max_steps=3)]
    config = TrainConfig(output=tmp_path / "out", plots=False, trackers=("tensorboard", "wandb", "mlflow"))
    results = train_adapters(tiny_model("llama"), tiny_tokenizer(), jobs=jobs, config=config)
    expected = [
        (entry.pop("step"), {f"{result.name}/{key}": value for key, value in entry.items()})
        for result in results
        for entry in map(json.loads, result.log.read_text().splitlines())
    ]
    for name in ("tensorboard", "mlflow"):
        logged = recorders[name].logged
        assert sorted(map(repr, logged)) == sorted(map(repr, expected)), name
    assert {key for _, values in recorders["mlflow"].logged for key in values} >= {
        *("team/a/loss", "team/a/eval_loss", "team/a/perplexity", "team/a/exact_match", "b/loss", "b/learning_rate"),
    }
    assert all(step is None for step, _ in recorders["wandb"].logged)
    assert [values["b/step"] for _, values in recorders["wandb"].logged if "b/loss" in values] == [1, 2, 3]
    assert recorders["wandb"].axes == {"team/a/*": "team/a/step", "b/*": "b/step"}
    assert recorders["mlflow"].settings["jobs/b/batch_size"] == 4
    assert all(recorder.is_finished for recorder in recorders.values())


def test_trackers_end_with_a_run_that_fails(
    tmp_path: Path, recorders: dict[str, Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Trainer, active: list[int]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "step", fail)
    config = TrainConfig(output=tmp_path / "out", plots=False, trackers=("mlflow",))
    with pytest.raises(KeyboardInterrupt):
        train_adapters(tiny_model("llama"), tiny_tokenizer(), jobs=[tiny_job(tmp_path, "a")], config=config)
    assert recorders["mlflow"].is_finished
    assert not recorders["wandb"].is_finished


def test_refuses_unknown_trackers_and_names_the_extra_of_missing_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorders: dict[str, Recorder]
) -> None:
    with pytest.raises(ConfigError, match=r"trackers is \('comet',\); give each of"):
        TrainConfig(output=tmp_path, trackers=("comet",))
    job = tiny_job(tmp_path, "wandb")
    config = TrainConfig(output=tmp_path / "out", plots=False, trackers=("wandb",))
    with pytest.raises(ConfigError, match="'wandb' is the folder of a tracker"):
        train_adapters(tiny_model("llama"), tiny_tokenizer(), jobs=[job], config=config)
    monkeypatch.undo()
    monkeypatch.setattr("loraplex.extras.EXTRAS", {"wandb": ("no_such_module",)})
    with pytest.raises(MissingExtraError, match=r"the tracker 'wandb' needs .*pip install 'loraplex\[wandb\]'"):
        TrainConfig(output=tmp_path, trackers=("wandb",))
