"""`loraplex demo`: its rows, its table, and the run itself."""

import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from rich.text import Text
from typer.testing import CliRunner

from loraplex.cli.app import cli
from loraplex.cli.demo import (
    MIXTURE,
    NEXT,
    REFUSE,
    SMALL_TALK,
    THEN_SOURCE,
    WIDTH,
    DemoRow,
    answers,
    demo_adapters,
    demo_residuals,
    demo_rows,
    shortened,
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


def printed(rows: list[DemoRow], texts: list[str]) -> list[str]:
    console = Console(width=WIDTH, force_terminal=True, color_system="standard")
    with console.capture() as captured:
        console.print(answers(rows, [answered(text) for text in texts]))
    return captured.get().splitlines()


def test_answers_are_shown_as_they_are_on_one_line_and_marked() -> None:
    asked = [("Paris", False), ("Paris", False), ("low", True), ("low", True), (None, False)]
    rows = [DemoRow(shows="base", prompt="?", adapters="a", truth=truth, begins=begins) for truth, begins in asked]
    texts = ["It is paris.\nAtlas.", "[bold]Rome[/bold]", "Low", "Not low", "x" * 100]
    lines = printed(rows, texts)[2:]
    marks = [("✓", "\x1b[32m"), ("✗", "\x1b[33m"), ("✓", "\x1b[32m"), ("✗", "\x1b[33m"), (" ", "")]
    shown = ["It is paris. Atlas.", "[bold]Rome[/bold]", "Low", "Not low", "xxx…"]
    for line, (mark, color), text in zip(lines, marks, shown, strict=False):
        assert mark in line
        assert color in line
        assert text.rstrip("…") in line
    assert "\x1b[32m" not in lines[4]
    assert "\x1b[33m" not in lines[4]


def test_demo_fits_into_80_columns() -> None:
    rows = demo_rows(ROOT / "data", list(demo_adapters(ROOT / "examples" / "adapters")))
    plain = [Text.from_ansi(line).plain for line in printed(rows, ["word " * 40] * len(rows))]
    assert max(map(len, [*plain, *NEXT.splitlines()])) <= 80
    prompts = list(dict.fromkeys(row.prompt for row in rows))
    assert sum(line[:1].isalpha() for line in plain) == len(prompts) == 6  # each in one line, above its rows
    assert shortened("a" * 50 + "b" * 50, 30) == "a" * 10 + " … " + "b" * 17


@pytest.mark.slow
@pytest.mark.timeout(900)  # it times the batch and judges questions, which takes a minute on free cores
def test_demo_shows_every_row_and_residuals_act(smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "80")
    result = CliRunner().invoke(cli, ["demo", "--dtype", "float32", "--questions", "2", "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    refused = [line.split() for line in lines if "I can't help with medical" in line]
    assert [words[:3] for words in refused] == [["✓", "residual", REFUSE], ["✓", "link", f"quantum:0.5+{REFUSE}"]]
    talk = lines.index(SMALL_TALK)
    assert lines[talk + 1].split()[:3] == ["✓", "base", "none"]
    assert "Tokyo" in lines[talk + 1]
    assert lines[talk + 2].split()[:3] == ["✓", "residual", f"{REFUSE}+{THEN_SOURCE}"]
    assert "Source: atlas." in lines[talk + 2]
    assert (tmp_path / "scalings.png").exists()
    assert lines[-len(NEXT.splitlines()) :] == NEXT.splitlines()
    assert "Loading weights" not in result.output


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_rows_of_pefts_kinds_run_through_peft_without_a_word_of_other_libraries(smollm2: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "demo_peft.py")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=800)
    assert (run.returncode, run.stderr) == (0, "")
    assert "PEFT, mixed batch" in run.stdout
    assert all(len(line) <= WIDTH for line in run.stdout.splitlines())
