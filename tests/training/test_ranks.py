"""Several processes share the rows of every micro-batch."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from loraplex.errors import ConfigError
from loraplex.training import TrainConfig, train_adapters
from tests.tiny_models import tiny_model
from tests.training.run_tiny import run, run_diverging
from tests.training.tiny_jobs import tiny_job, tiny_tokenizer

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch(folder: Path, *arguments: str) -> None:
    """Run run_tiny in two processes."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    environment["ACCELERATE_USE_CPU"] = "true"
    options = ["--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    # `accelerate launch --cpu` starts one process only, unless there is an MPI.
    command = [sys.executable, "-m", "torch.distributed.run", *options, "-m", "tests.training.run_tiny"]
    subprocess.run([*command, str(folder), *arguments], cwd=ROOT, env=environment, check=True, timeout=240)


@pytest.mark.parametrize("kind", ["adapters", "sharded"])
def test_two_processes_follow_the_trajectory_of_one(kind: str, tmp_path: Path) -> None:
    launch(tmp_path, kind)
    assert (tmp_path / "finished-1.json").exists(), "the second process did nothing"
    for expected in run(tmp_path, tmp_path / "one"):
        log = [json.loads(line) for line in (tmp_path / "out" / f"{expected.name}.jsonl").read_text().splitlines()]
        losses = [entry["loss"] for entry in log if "loss" in entry]
        held_out = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
        assert losses == pytest.approx(expected.train_losses, rel=1e-5)
        assert held_out == pytest.approx(expected.eval_losses, rel=1e-5)
        actual = load_file(tmp_path / "out" / expected.name / "adapter_model.safetensors")
        for name, tensor in load_file(expected.folder / "adapter_model.safetensors").items():
            assert (actual[name] - tensor).abs().max().item() < 1e-3 * tensor.abs().max().item() + 1e-6, name


def test_two_processes_agree_on_what_diverged(tmp_path: Path) -> None:
    launch(tmp_path, "diverging")
    expected = {
        result.name: [result.finished, result.num_steps] for result in run_diverging(tmp_path, tmp_path / "one")
    }
    assert expected == {"good": ["steps", 10], "bad": ["diverged", 1]}
    for rank in range(2):
        assert json.loads((tmp_path / f"finished-{rank}.json").read_text()) == expected
    assert (tmp_path / "out" / "bad.diverged" / "adapter_config.json").exists()


def test_refuses_to_shard_over_one_process(tmp_path: Path) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    config = TrainConfig(output=tmp_path / "out", plots=False, fsdp=True)
    with pytest.raises(ConfigError, match="fsdp is True, but there is one process"):
        train_adapters(model, tokenizer, jobs=[tiny_job(tmp_path, "a")], config=config)
