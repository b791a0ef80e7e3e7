import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from loraplex.adapters.inspect import describe
from loraplex.cli.inspect import inspect
from loraplex.errors import AdapterFormatError
from tests.adapters.folders import write_folder


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer()
    app.command()(inspect)
    return app


def test_table_shows_summary_and_every_module_type_within_80_columns(app: typer.Typer, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "protein", {"use_rslora": True, "base_model_name_or_path": "a/[b]"})
    result = CliRunner().invoke(app, [str(folder)], env={"COLUMNS": "80"})
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert max(map(len, lines)) <= 80
    for words in (["protein"], ["a/[b]"], ["LoRA with rsLoRA"], ["q_proj", "1", "16 -> 24", "4"], ["v_proj"]):
        assert any(all(word in line for word in words) for line in lines), words
    assert "…" not in result.output


def test_json_is_the_report(app: typer.Typer, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "protein")
    result = CliRunner().invoke(app, [str(folder), "--json"])
    assert json.loads(result.output) == json.loads(json.dumps(describe(folder).as_json()))


def test_folder_without_an_adapter_raises_the_typed_error(app: typer.Typer, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, [str(tmp_path)])
    assert isinstance(result.exception, AdapterFormatError)
