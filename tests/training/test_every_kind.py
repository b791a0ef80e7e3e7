"""Every kind of job under every way of computing: the same curves; and a killed run goes on bit for bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from loraplex.training import TrainConfig, TrainResult, train_adapters
from loraplex.training.core.trainer import Trainer
from tests.tiny_models import tiny_model
from tests.training.every_kind import RESIDUALS, jobs_of_every_kind
from tests.training.tiny_jobs import tiny_tokenizer

WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpointing": {"gradient_checkpointing": True},
    "packing": {"packing": True},
    "packing and checkpointing": {"packing": True, "gradient_checkpointing": True},
    "bfloat16": {"gradient_checkpointing": True, "share_prefixes": False},
}
Run = Callable[[str, Path], list[TrainResult]]


def train(way: str, folder: Path, output: Path) -> list[TrainResult]:
    options = WAYS[way]
    jobs = jobs_of_every_kind(folder, without=RESIDUALS if options.get("packing") else ())
    config = TrainConfig(output=output, plots=False, checkpoint_every=2, tokens_per_forward=400, **options)
    base = tiny_model("llama", dtype=torch.bfloat16 if way == "bfloat16" else torch.float32)
    return train_adapters(base, tiny_tokenizer(), jobs=jobs, config=config)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, list[TrainResult]]]:
    """The whole run of a way, once."""
    known: dict[str, tuple[Path, list[TrainResult]]] = {}

    def run(way: str) -> tuple[Path, list[TrainResult]]:
        if way not in known:
            folder = tmp_path_factory.mktemp("kinds")
            known[way] = folder, train(way, folder, folder / "whole")
        return known[way]

    return run


@pytest.mark.parametrize("way", ["checkpointing", "packing", "packing and checkpointing"])
def test_curves_are_those_of_plain_passes(way: str, whole: Any) -> None:
    expected = {result.name: result for result in whole("plain")[1]}
    for found in whole(way)[1]:
        other = expected[found.name]
        assert found.train_losses == pytest.approx(other.train_losses, rel=1e-4, abs=1e-6), found.name
        assert found.eval_losses == pytest.approx(other.eval_losses, rel=1e-4, abs=1e-6), found.name
        assert found.eval_exact == other.eval_exact, found.name
        assert max(other.train_losses) > 1.001 * min(other.train_losses), f"{found.name} doesn't change"


@pytest.mark.parametrize("way", ["plain", *(pytest.param(way, marks=pytest.mark.slow) for way in [*WAYS][1:])])
def test_killed_run_goes_on_bit_for_bit(way: str, whole: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, expected = whole(way)

    class Killed(Exception):
        pass

    def kill(states: Any) -> None:
        if states[0].progress.step == 3:  # the last checkpoint has step 2
            raise Killed

    run = Trainer.run
    output = folder / "killed"
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "run", lambda self, on_step, stop: run(self, kill, stop))
        with pytest.raises(Killed):
            train(way, folder, output)
    assert not (output / expected[0].name).exists()
    for found, other in zip(train(way, folder, output), expected, strict=True):
        assert (found.train_losses, found.eval_losses) == (other.train_losses, other.eval_losses), found.name
        assert found.log.read_bytes() == other.log.read_bytes(), found.name
        files = {path.name: path.read_bytes() for path in other.folder.iterdir()}
        assert any(name.endswith(".safetensors") for name in files)
        assert {path.name: path.read_bytes() for path in found.folder.iterdir()} == files, found.name
