"""Several processes share the rows of every micro-batch."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loraplex.adapters.config import LoraConfig
from loraplex.errors import ConfigError
from loraplex.residual.modules import ResidualConfig, SteeringVector
from loraplex.residual.positions import parse_positions
from loraplex.residual.reft import ReftConfig
from loraplex.training import TrainConfig, train_adapters
from loraplex.training.core import distributed
from loraplex.training.core.distributed import ProcessGroup
from tests.tiny_models import tiny_model
from tests.training.run_tiny import NOT_SHARDED, run, run_diverging, run_kinds
from tests.training.tiny_jobs import tiny_job, tiny_tokenizer

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch(*arguments: str) -> None:
    """Run a module in two processes."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    environment["ACCELERATE_USE_CPU"] = "true"
    options = ["--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    # `accelerate launch --cpu` starts one process only, unless there is an MPI.
    command = [sys.executable, "-m", "torch.distributed.run", *options, "-m", *arguments]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=240)


@pytest.mark.parametrize("kind", [pytest.param("adapters", marks=pytest.mark.slow), "sharded"])
def test_two_processes_follow_the_trajectory_of_one(kind: str, tmp_path: Path) -> None:
    launch("tests.training.run_tiny", str(tmp_path), kind)
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


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "without"), [("kinds", ()), ("sharded kinds", NOT_SHARDED)])
def test_two_processes_follow_the_trajectory_of_one_for_every_kind_of_job(
    kind: str, without: tuple[str, ...], tmp_path: Path
) -> None:
    """A sharded base with gradient checkpointing too, and a process whose share has no pairs of DPO."""
    launch("tests.training.run_tiny", str(tmp_path), kind)
    for expected in run_kinds(tmp_path, tmp_path / "one", without=without):
        log = [json.loads(line) for line in (tmp_path / "out" / f"{expected.name}.jsonl").read_text().splitlines()]
        losses = [entry["loss"] for entry in log if "loss" in entry]
        held_out = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
        assert losses == pytest.approx(expected.train_losses, rel=1e-4, abs=1e-6), expected.name
        assert held_out == pytest.approx(expected.eval_losses, rel=1e-4, abs=1e-6), expected.name


@pytest.mark.slow
def test_two_processes_agree_on_what_diverged(tmp_path: Path) -> None:
    launch("tests.training.run_tiny", str(tmp_path), "diverging")
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


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"packing": True}, "fsdp and packing are both True"),
        ({"lora": LoraConfig(r=2, target_modules=("q_proj",), use_dora=True)}, "job 'a': fsdp is True, but DoRA"),
        ({"lora": None, "reft": ReftConfig(r=2, positions=parse_positions("all"))}, "job 'a': .* residuals don't have"),
        ({"lora": None, "residual": ResidualConfig(r=2)}, "job 'a': .* residuals don't have"),
        (
            {"after": [(SteeringVector(vectors={0: torch.ones(64)}, base=None), 1.0)]},
            "job 'a': .* residuals don't have",
        ),
    ],
)
def test_what_a_sharded_base_can_not_train_is_refused(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    run_options = {key: options.pop(key) for key in ("packing",) if key in options}
    config = TrainConfig(output=tmp_path / "out", plots=False, fsdp=True, **run_options)
    with pytest.raises(ConfigError, match=said):
        train_adapters(tiny_model("llama"), tiny_tokenizer(), jobs=[tiny_job(tmp_path, "a", **options)], config=config)
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_plain_are_not_sharded(tmp_path: Path) -> None:
    base = tiny_model("llama")
    linear = base.model.layers[0].mlp.up_proj
    linear.weight_quantized = torch.nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)
    config = TrainConfig(output=tmp_path / "out", plots=False, fsdp=True)
    with pytest.raises(ConfigError, match=r"up_proj.weight_quantized' of the base model is a Parameter of uint8"):
        train_adapters(base, tiny_tokenizer(), jobs=[tiny_job(tmp_path, "a")], config=config)


@pytest.mark.slow
def test_the_command_line_in_two_processes_is_one_run_on_a_sharded_base(tmp_path: Path) -> None:
    job = tiny_job(tmp_path, "a", max_steps=2, learning_rate=1e-3, seed=0)
    tiny_model("llama").save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    options = ["--model", str(tmp_path / "base"), "--output", str(tmp_path / "out"), "--data", f"a={job.data}"]
    options += ["--rank", "4", "--targets", "q_proj,v_proj", "--steps", "2", "--batch-size", "4", "--max-length", "256"]
    launch("loraplex.cli.train", "adapters", *options, "--fsdp", "--no-plots", "--eval-every", "5")
    config = TrainConfig(output=tmp_path / "one", plots=False)
    (expected,) = train_adapters(tiny_model("llama"), tiny_tokenizer(), jobs=[job], config=config)
    log = [json.loads(line) for line in (tmp_path / "out" / "a.jsonl").read_text().splitlines()]
    assert [entry["loss"] for entry in log if "loss" in entry] == pytest.approx(expected.train_losses, rel=1e-5)


def test_a_base_in_a_machines_memory_is_sharded_over_the_devices_that_accelerate_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []
    monkeypatch.setattr(distributed, "PartialState", lambda cpu: asked.append(cpu))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    ProcessGroup(torch.device("cpu"))
    ProcessGroup(torch.device("cpu"), sharded=True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    ProcessGroup(torch.device("cpu"), sharded=True)
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    ProcessGroup(torch.device("cpu"), sharded=True)
    assert asked == [True, False, True, True]
