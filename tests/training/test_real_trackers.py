"""TensorBoard, W&B without a network, and MLflow themselves: what each has on disk after a run."""

from pathlib import Path

import pytest

from loraplex.training import TrainConfig, TrainResult, train_adapters
from tests.tiny_models import tiny_model
from tests.training.tiny_jobs import tiny_job, tiny_tokenizer

pytestmark = pytest.mark.slow


def run(folder: Path, tracker: str) -> TrainResult:
    (folder / "team").mkdir()
    config = TrainConfig(output=folder / "out", plots=False, trackers=(tracker,))
    job = tiny_job(folder, "team/a", max_steps=6)
    (result,) = train_adapters(tiny_model("llama"), tiny_tokenizer(), jobs=[job], config=config)
    return result


@pytest.mark.needs("tensorboard")
def test_tensorboard_has_the_losses(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = run(tmp_path, "tensorboard")
    events = EventAccumulator(str(tmp_path / "out" / "tensorboard"))
    events.Reload()
    losses = [(event.step, event.value) for event in events.Scalars("team/a/loss")]
    assert [step for step, _ in losses] == [1, 2, 3, 4, 5, 6]
    assert [value for _, value in losses] == pytest.approx(result.train_losses)
    assert events.Scalars("team/a/exact_match")


@pytest.mark.needs("mlflow")
def test_mlflow_has_the_losses_and_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    result = run(tmp_path, "mlflow")
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'out' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("loraplex")
    (found,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(found.info.run_id, "team/a/loss")
    assert [point.value for point in sorted(history, key=lambda p: p.step)] == pytest.approx(result.train_losses)
    assert (found.info.run_name, found.info.status) == ("out", "FINISHED")
    assert found.data.params["jobs/team/a/batch_size"] == "4"


@pytest.mark.needs("wandb")
def test_wandb_keeps_a_run_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    result = run(tmp_path, "wandb")
    (file,) = (tmp_path / "out" / "wandb").glob("offline-run-*/*.wandb")
    content = file.read_bytes()  # numbers stand there as JSON, behind their names
    assert b"team/a/loss" in content
    assert [loss for loss in result.train_losses if str(loss).encode() not in content] == []
