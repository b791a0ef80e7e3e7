"""What a mixture's run goes on from, refuses to go on from, and leaves when it diverges; test_resume.py stops runs."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loraplex import XLoraConfig
from loraplex.errors import AdapterExistsError, CheckpointError, TrainingError
from loraplex.training import TrainResult, train_mixture
from loraplex.training.core import checks
from loraplex.training.mixture.state import MixtureState
from tests.training.mixture.tiny_mixture import NAME, tiny_config, tiny_mixture, tiny_sources
from tests.training.tiny_jobs import records


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"learning_rate": 1e-4}, r"training\.learning_rate was 0\.01 and is 0\.0001"),
        ({"seed": 9}, r"training\.seed was 0 and is 9"),
        ({"load_balance_weight": 0.5}, r"training\.load_balance_weight was"),
    ],
)
def test_checkpoint_of_other_settings_is_refused(tmp_path: Path, change: dict[str, Any], difference: str) -> None:
    start(tmp_path)
    with pytest.raises(CheckpointError, match=difference):
        start(tmp_path, **change)


def test_checkpoint_of_other_data_experts_or_mixture_is_refused(tmp_path: Path) -> None:
    start(tmp_path)
    sources = tiny_sources(tmp_path)
    sources[1] = replace(sources[1], data=records("prompt", 24, seed=77))
    model = tiny_mixture(tmp_path)
    with pytest.raises(CheckpointError, match=r"data\.content was"):
        train_mixture(model, NAME, sources, tiny_config(tmp_path / "out"))
    with pytest.raises(CheckpointError, match=r"mixture\.config\.top_k_lora was None and is 1"):
        start(tmp_path, xlora=XLoraConfig(top_k_lora=1))
    model = tiny_mixture(tmp_path)
    model.mixtures.remove(NAME)
    model.create_mixture(NAME, ["e1", "e0", "e2"], seed=1)
    with pytest.raises(CheckpointError, match=r"mixture\.experts was \['e0', 'e1', 'e2'\]"):
        train_mixture(model, NAME, tiny_sources(tmp_path), tiny_config(tmp_path / "out"))


def test_a_mixture_without_a_checkpoint_is_not_overwritten(tmp_path: Path) -> None:
    start(tmp_path)
    (tmp_path / "out" / "checkpoint.safetensors").unlink()
    with pytest.raises(AdapterExistsError, match="no checkpoint to go on from"):
        start(tmp_path)
    result = start(tmp_path, resume=False, max_steps=2)
    assert result.num_steps == 2


@pytest.mark.parametrize("name", [NAME, f"{NAME}.diverged"])
def test_a_folder_that_is_no_mixture_is_refused_before_training(tmp_path: Path, name: str) -> None:
    (tmp_path / "out" / name).mkdir(parents=True)
    (tmp_path / "out" / name / "notes.txt").write_text("mine")
    with pytest.raises(AdapterExistsError, match="is not a whole mixture"):
        start(tmp_path, resume=False)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]


@pytest.mark.parametrize("trainable", [False, True])
def test_divergence_keeps_the_last_good_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainable: bool
) -> None:
    """Two good steps, then one that leads to weights without a finite loss."""
    xlora = XLoraConfig(enable_softmax=False, use_trainable_adapters=trainable)
    options: dict[str, Any] = {"max_grad_norm": None, "eval_fraction": 0, "xlora": xlora, "schedule": "constant"}
    update, seen = MixtureState.update, []

    def explode(self: MixtureState, *arguments: Any) -> float:
        seen.append(self.flat.detach().clone())
        if self.progress.step == 2:
            self.optimizer.adamw.param_groups[0]["lr"] = 1e37
        return update(self, *arguments)

    monkeypatch.setattr(MixtureState, "update", explode)
    message = r"mixture 'science' diverged in step 4.*learning_rate \(0\.01\).*science\.diverged.*resume=False"
    for _ in range(2):  # the second finds it in the checkpoint
        with pytest.raises(TrainingError, match=message) as raised:
            start(tmp_path, max_steps=6, **options)
        (result,) = raised.value.results
        assert (result.finished, result.num_steps, result.divergence.last_good_step) == ("diverged", 3, 2)
        assert (len(seen), (tmp_path / "out" / NAME).exists()) == (4, False)
        assert torch.equal(load_file(tmp_path / "out" / "checkpoint.safetensors")["0.parameters"], seen[2])
        model = tiny_mixture(tmp_path)
        model.load_mixture("good", result.folder)
        head = torch.cat([parameter.reshape(-1) for parameter in model.mixtures.get("good").head.parameters()])
        assert torch.equal(head, seen[2][: len(head)])
    assert '"diverged"' in result.log.read_text().splitlines()[-1]
    monkeypatch.setattr(MixtureState, "update", update)
    assert start(tmp_path, max_steps=6, resume=False, **options).finished == "steps"


def test_a_mixture_that_diverged_is_left_as_it_was_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "MAX_LEARNING_RATE", 1e39)
    model = tiny_mixture(tmp_path, XLoraConfig(enable_softmax=False))
    before = {name: tensor.clone() for name, tensor in model.mixtures.get(NAME).head.state_dict().items()}
    config = tiny_config(tmp_path / "out", max_steps=3, learning_rate=1e38, max_grad_norm=None)
    with pytest.raises(TrainingError, match="diverged in step 1: its weights"):
        train_mixture(model, NAME, tiny_sources(tmp_path), config)
    after = model.mixtures.get(NAME).head.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def start(folder: Path, xlora: XLoraConfig | None = None, **options: Any) -> TrainResult:
    config = tiny_config(folder / "out", **{"max_steps": 4} | options)
    return train_mixture(tiny_mixture(folder, xlora), NAME, tiny_sources(folder), config)
