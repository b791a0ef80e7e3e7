"""The examples run as their users run them, on the real base model.

Where an answer is told, they run in float32: which of two near answers bfloat16 gives is up to the processor.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.image import imread

from loraplex.adapters.peft.reader import read_adapter

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


def run_example(name: str, *arguments: str) -> str:
    command = [sys.executable, f"examples/{name}", *arguments]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_mixed_batch_answers_every_row_and_keeps_base_rows(smollm2: Path) -> None:
    output = run_example("01_mixed_batch.py", "--dtype", "float32")
    assert "-> The capital of France is Paris" in output
    lines = [line for line in output.splitlines() if line.startswith("row ")]
    assert ["to the bit" in line for line in lines] == [True, True, False, False, False]
    assert "still loaded: quantum" in output


def test_two_adapters_are_trained_written_and_used(smollm2: Path, tmp_path: Path) -> None:
    output = run_example("02_train_two_adapters.py", "--steps", "2", "--output", str(tmp_path / "out"))
    ranks = {name: read_adapter(tmp_path / "out" / name).config.r for name in ("quantum", "protein")}
    assert ranks == {"quantum": 8, "protein": 16}
    assert "in 2 steps" in output
    assert "none (base model): " in output
    assert "quantum+protein: " in output


def test_notebook_runs_and_its_mixture_learns(smollm2: Path) -> None:
    import nbclient
    import nbformat

    notebook = nbformat.read(ROOT / "examples" / "03_mixture.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=280, resources={"metadata": {"path": ROOT / "examples"}}).execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    images = [output for cell in cells for output in cell.outputs if "image/png" in output.get("data", {})]
    assert len(images) == 5
    assert cells[-1].outputs[0]["data"]["text/plain"].count("'") == 4  # two answers, of one mixture loaded twice


def test_emphasis_changes_answers_and_strength_one_does_not(smollm2: Path, tmp_path: Path) -> None:
    arguments = ("--dtype", "float32", "--cases", "2", "--strengths", "4", "--write", str(tmp_path / "found.json"))
    run_example("residual/emphasis.py", *arguments)
    found = json.loads((tmp_path / "found.json").read_text())
    rows = ["as it is", "right passage, strength 1", "right passage, strength 4", "wrong passage, strength 4"]
    assert list(found["right"]) == rows
    assert found["right"][rows[1]] == found["right"][rows[0]]
    assert found["right"][rows[2]] > found["right"][rows[3]]
    assert found["changed_by_strength_1"] == 0


def test_behaviours_are_taught_linked_and_judged(smollm2: Path, tmp_path: Path) -> None:
    arguments = ("--steps", "1", "--questions", "4", "--output", str(tmp_path))
    assert "linked, trained in the link: residual" in run_example("residual/behaviours.py", *arguments)
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["scores"]) == 9
    assert results["scores"]["base"]["source"] == 0
    assert all(len(losses) == 1 for _, losses in results["held_out_losses"].values())


def test_curves_are_drawn(tmp_path: Path) -> None:
    run_example("residual/curves.py", "--picture", str(tmp_path / "curves.png"))
    assert imread(tmp_path / "curves.png").std() > 0.01
