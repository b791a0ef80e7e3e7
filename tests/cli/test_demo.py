"""`loraplex demo`: its rows, its table, and the run itself."""

from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from loraplex.cli.app import cli
from loraplex.cli.demo import (
    MIXTURE,
    REFUSE,
    THEN_SOURCE,
    DemoRow,
    answers_table,
    demo_adapters,
    demo_residuals,
    demo_rows,
)
from loraplex.engine.request import Completion, RequestResult
from loraplex.errors import AdapterNotFoundError

ROOT = Path(__file__).parent.parent.parent
LORAS = ("materials", "peptides", "protein", "quantum")


def answered(text: str) -> RequestResult:
    done = Completion(index=0, text=text, token_ids=(1,), finish_reason="stop")
    return RequestResult(request_id="r", prompt_token_ids=(1,), completions=(done,), num_cached_tokens=0)


def test_rows_are_of_every_kind() -> None:
    names = list(demo_adapters(ROOT / "examples" / "adapters"))
    assert tuple(names) == LORAS
    choices = [row.adapters for row in demo_rows(ROOT / "data", names)]
    assert {None, *LORAS, MIXTURE, REFUSE, f"{REFUSE}+{THEN_SOURCE}"} <= set(choices)
    assert "materials:0.6+peptides:0.6" in choices
    assert f"quantum:0.5+{REFUSE}" in choices


def test_residuals_that_are_missing_are_named(tmp_path: Path) -> None:
    assert list(demo_residuals(ROOT / "examples" / "residual" / "adapters")) == [REFUSE, THEN_SOURCE]
    with pytest.raises(AdapterNotFoundError, match=r"'refuse', 'then-source'.*--residuals"):
        demo_residuals(tmp_path)


def test_table_shows_answers_as_they_are_on_one_line_and_marks_them() -> None:
    texts = ("It is Paris.\nSource: atlas.", "[bold]Rome[/bold]", "x" * 100)
    truths = ("paris", "Paris", None)
    rows = [DemoRow(prompt="?", adapters="a", truth=truth) for truth in truths]
    results = [answered(text) for text in texts]
    console = Console(width=200, force_terminal=True, color_system="standard")
    with console.capture() as captured:
        console.print(answers_table(rows, results))
    lines = captured.get().splitlines()
    right = next(line for line in lines if "It is Paris. Source: atlas." in line)
    wrong = next(line for line in lines if "[bold]Rome[/bold]" in line)
    unjudged = next(line for line in lines if "xxx" in line)
    assert "\x1b[32m" in right
    assert "\x1b[33m" in wrong
    assert "\x1b[32m" not in unjudged
    assert "\x1b[33m" not in unjudged
    assert "x" * 77 + "..." in unjudged


@pytest.mark.slow
@pytest.mark.timeout(900)  # it times the batch and judges questions, which takes a minute on free cores
def test_demo_shows_every_row_and_residuals_act(smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "200")
    result = CliRunner().invoke(cli, ["demo", "--dtype", "float32", "--questions", "2", "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    refused = [line for line in lines if "I can't help with medical questions." in line]
    assert [line.split()[0] for line in refused] == [REFUSE, f"quantum:0.5+{REFUSE}"]
    assert any(line.split()[:1] == [f"{REFUSE}+{THEN_SOURCE}"] and "Paris. Source: atlas." in line for line in lines)
    assert (tmp_path / "scalings.png").exists()
