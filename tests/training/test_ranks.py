"""Several processes share the rows of every micro-batch."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.training.run_tiny import run

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_two_processes_follow_the_trajectory_of_one(tmp_path: Path) -> None:
    port = str(free_port())
    options = [
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ]
    launch = [sys.executable, "-m", "accelerate.commands.launch", *options, "--main_process_port", port]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    command = [*launch, "-m", "tests.training.run_tiny", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=240)
    for expected in run(tmp_path, tmp_path / "one"):
        log = [json.loads(line) for line in (tmp_path / "out" / f"{expected.name}.jsonl").read_text().splitlines()]
        losses = [entry["loss"] for entry in log if "loss" in entry]
        held_out = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
        assert losses == pytest.approx(expected.train_losses, rel=1e-5)
        assert held_out == pytest.approx(expected.eval_losses, rel=1e-5)
        actual = load_file(tmp_path / "out" / expected.name / "adapter_model.safetensors")
        for name, tensor in load_file(expected.folder / "adapter_model.safetensors").items():
            assert (actual[name] - tensor).abs().max().item() < 1e-3 * tensor.abs().max().item() + 1e-6, name
