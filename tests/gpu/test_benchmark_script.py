"""benchmarks/gpu.py: without a device it says so; on a CPU its tiny sizes run every section."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.parts import NOT_THIS_MACHINE

ROOT = Path(__file__).parent.parent.parent
SCRIPT = "benchmarks/gpu.py"
needs_triton = pytest.mark.needs("triton")


def run(*options: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, SCRIPT, *options]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason=f"{NOT_THIS_MACHINE}a lack of CUDA devices")
def test_without_a_device_it_says_so_and_ends_with_its_own_status(tmp_path):
    ended = run("--output", str(tmp_path / "gpu.json"))
    assert ended.returncode == 3
    assert "no CUDA device" in ended.stderr
    assert "--tiny --device cpu" in ended.stderr
    assert not (tmp_path / "gpu.json").exists()


def test_the_full_sizes_are_refused_on_a_cpu():
    ended = run("--device", "cpu")
    assert ended.returncode == 2
    assert "--tiny" in ended.stderr


@needs_triton
@pytest.mark.timeout(900)
@pytest.mark.slow
def test_every_section_runs_on_a_cpu(tmp_path):
    output = tmp_path / "gpu.json"
    ended = run("--tiny", "--device", "cpu", "--output", str(output))
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    told = json.loads(output.read_text())
    figures = {figure["what"]: figure for figure in told["results"]}
    for dtype in ("bfloat16", "float32"):
        assert figures[f"error, {dtype}"]["holds"] is True
    assert all(figure["value"] >= 0 for figure in figures.values())
    parts = (
        "shrink, of",
        "expand, of",
        "bmm over",
        "with / without adapters",
        "oracle draft: token",
        "PEFT's mixed batch",
    )
    for part in parts:
        assert any(part in what for what in figures), part
    # Bars of a GPU are not judged on a CPU.
    assert {figure["holds"] for what, figure in figures.items() if not what.startswith("error")} == {None}
    oracle = figures["X-LoRA, oracle draft: passes a token"]["value"]
    assert oracle <= figures["X-LoRA, drafted: passes a token"]["value"]
    assert oracle < 1.5
