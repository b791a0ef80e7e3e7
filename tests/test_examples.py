"""The examples run as their users run them, on the real base model.

Where an answer is told, they run in float32: which of two near answers bfloat16 gives is up to the processor.
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

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


def run_notebook(name: str) -> list[Any]:
    """The code cells of a notebook after it ran."""
    import nbclient
    import nbformat

    notebook = nbformat.read(ROOT / "examples" / name, as_version=4)
    nbclient.NotebookClient(notebook, timeout=500, resources={"metadata": {"path": ROOT / "examples"}}).execute()
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def images(cells: list[Any]) -> int:
    return sum("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs)


def printed(cells: list[Any]) -> str:
    return "".join(
        output.get("text", "") for cell in cells for output in cell.outputs if output.get("name") != "stderr"
    )


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.ipynb")), ids=lambda path: path.name)
def test_notebooks_are_kept_without_what_they_gave(path: Path) -> None:
    cells = json.loads(path.read_text())["cells"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells if cell["cell_type"] == "code")


def test_notebook_runs_and_its_mixture_learns(smollm2: Path) -> None:
    cells = run_notebook("03_mixture.ipynb")
    assert images(cells) == 5
    assert cells[-1].outputs[0]["data"]["text/plain"].count("'") == 4  # two answers, of one mixture loaded twice


def test_notebook_serves_three_adapters_and_compares_them(smollm2: Path) -> None:
    text = printed(run_notebook("04_serve.ipynb"))
    assert "15 requests in" in text
    assert text.count("quantum:0.5+materials:0.5") == 3
    assert "403" in text


@pytest.mark.timeout(900)
def test_notebook_trains_two_adapters_and_a_mixture_on_a_csv(smollm2: Path) -> None:
    cells = run_notebook("05_your_own_csv.ipynb")
    text = printed(cells)
    assert images(cells) == 2
    assert "geography  Ahoy! " in text
    assert "sums  Beep. " in text
    assert "What is the capital of France? -> Ahoy! " in text


def test_notebook_shows_attention_and_steers_it(smollm2: Path) -> None:
    cells = run_notebook("06_attention.ipynb")
    text = printed(cells)
    assert images(cells) == 4
    assert "I can't help with medical questions." in text
    plain, tiger, misty = [line.partition(": ")[2] for line in text.splitlines() if "is called" in line]
    assert "Tiger" not in plain
    assert "Tiger" in tiger
    assert "Misty" in misty


def test_emphasis_changes_answers(smollm2: Path, tmp_path: Path) -> None:
    arguments = ("--dtype", "float32", "--cases", "2", "--strengths", "4", "--shares", "0.2", "--key-edits")
    arguments += ("--learnt-from", "3", "--tried-on", "1", "--keep", str(tmp_path / "kept.jsonl"))
    run_example("residual/emphasis.py", *arguments, "--write", str(tmp_path / "found.json"))
    found = json.loads((tmp_path / "found.json").read_text())
    ways = ("strength 4", "share 0.2", "key edits")
    assert list(found["right"]) == [
        "as it is",
        *(f"{kind} passage, {way}" for kind in ("right", "wrong") for way in ways),
    ]
    for way in ways[:2]:
        assert found["right"][f"right passage, {way}"] > found["right"][f"wrong passage, {way}"]
    kept = (tmp_path / "kept.jsonl").read_text()
    assert len(kept.splitlines()) == 1 + 2 * len(found["right"])
    # Answers that were kept aren't asked for again: these would be other ones.
    (tmp_path / "kept.jsonl").write_text(re.sub(r'(\[0, "as it is", ).*', r'\1"kept"]', kept))
    assert "as it is: kept" in run_example("residual/emphasis.py", *arguments)


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
