"""All steps once with almost nothing, one of them killed; and the notebook as its reader runs it."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from examples.science.layout import MIXTURES, cells
from examples.science.settings import read_settings
from examples.science.ship import ship
from examples.science.table import render
from loraplex import MultiLoraModel

ROOT = Path(__file__).parents[2]
SCIENCE = ROOT / "examples" / "science"
pytestmark = pytest.mark.slow


@pytest.mark.timeout(3000)
def test_all_steps_run_and_a_killed_run_goes_on(smollm2: Path, tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    output = tmp_path / "run"
    text = (SCIENCE / "smoke.toml").read_text()
    file.write_text(
        text.replace("runs/science-smoke", str(output)).replace("examples/science/sample", str(SCIENCE / "sample"))
    )
    start = [sys.executable, "-m", "examples.science"]
    command = [*start, "run", "--settings", str(file), "--downloads", str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    while not (output / "answers" / "base.json").exists():
        assert process.poll() is None, "the run ended by itself"
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    asked = (output / "answers" / "base.json").read_bytes()
    finished = {path.name: path.read_bytes() for path in (output / "done").iterdir()}
    assert "ask.json" not in finished
    subprocess.run(command, cwd=ROOT, check=True, timeout=2400)
    assert all((output / "done" / name).read_bytes() == content for name, content in finished.items())

    plan = [*start, "plan", "--settings", str(file)]
    left = subprocess.run(plan, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
    assert left.split()[:3] == ["left", "0.0", "min,"]

    settings = replace(read_settings(file), output=output)
    answers = json.loads((output / "answers" / "base.json").read_text())
    assert all(answers[task] == found for task, found in json.loads(asked).items())
    scores = json.loads((output / "scores.json").read_text())
    assert {(column, task) for task, columns in scores.items() for column in columns} == set(cells(settings))
    table = render(settings, scores)
    assert all(column in table for column in MIXTURES)
    for mixture in ("xlora", "router"):
        folder = output / "gates" / mixture
        assert (folder / "by-domain.png").stat().st_size > 5000
        assert set(json.loads((folder / "ablation.json").read_text())["right"]) == {"nobody", *settings.experts}

    ship(settings, tmp_path / "shipped", joint=True)
    model = MultiLoraModel.from_pretrained("smollm2-135m", dtype="bfloat16")
    experts = {f"science/{domain}": tmp_path / "shipped/adapters" / domain for domain in settings.experts}
    model.load_mixture("science", tmp_path / "shipped/mixtures/xlora", experts=experts)
    assert "science" in model.names()


@pytest.mark.timeout(1200)
def test_notebook_trains_on_a_csv_and_compares(smollm2: Path) -> None:
    import nbclient
    import nbformat

    notebook = nbformat.read(SCIENCE / "own_csv.ipynb", as_version=4)
    assert all(not cell.outputs for cell in notebook.cells if cell.cell_type == "code"), "kept with what it gave"
    nbclient.NotebookClient(notebook, timeout=1000, resources={"metadata": {"path": SCIENCE}}).execute()
    streams = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    text = "".join(stream.get("text", "") for stream in streams if stream.get("name") == "stdout")
    assert "0 formulas that can't be read" in text
    before, after = text.partition("loss ")[2].partition(",")[0].split(" -> ")
    assert float(after) < float(before)
    assert "adapter: R2" in text
    assert "ridge: R2" in text
    assert "valid " in text
