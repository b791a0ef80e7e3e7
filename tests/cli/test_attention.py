"""`loraplex attention` and `loraplex vector`."""

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from loraplex.cli.app import cli
from loraplex.cli.inspect import render_residual
from loraplex.cli.options import numbers
from loraplex.cli.vector import read_pairs
from loraplex.errors import AdapterFormatError, DatasetError, RequestError
from loraplex.residual import SteeringVector, read_residual
from loraplex.residual.report import describe_residual

runner = CliRunner()


def test_numbers_and_ranges() -> None:
    assert numbers(None) is None
    assert numbers("3") == (3,)
    assert numbers("10, 12-14,12") == (10, 12, 13, 14)


@pytest.mark.parametrize("text", ["", "a", "3-", "5-3", "1;2", "-1"])
def test_what_is_no_list_of_numbers_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="10,11"):
        numbers(text)


@pytest.mark.parametrize(
    ("lines", "message"),
    [("", "empty"), ('{"wanted": "a"}', ":1"), ("\n[1]", ":2"), ('{"wanted": 1, "unwanted": "b"}', "no texts")],
)
def test_pairs_that_can_not_be_read_are_refused(lines: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text(lines)
    with pytest.raises(DatasetError, match=message):
        read_pairs(tmp_path / "pairs.jsonl")


@pytest.mark.parametrize("how", ["--strength", "--share"])
def test_steering_without_marks_is_refused(smollm2: Path, how: str) -> None:
    result = runner.invoke(cli, ["attention", "--prompt", "no marks", how, "0.5"])
    assert isinstance(result.exception, RequestError)


@pytest.mark.slow
def test_vector_is_written_and_its_effect_drawn(smollm2: Path, tmp_path: Path) -> None:
    """From pairs to a steering vector, and from a marked prompt to pictures of all rows."""
    pairs = [{"wanted": "I love this.", "unwanted": "I hate this."}]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    result = runner.invoke(
        cli, ["vector", str(tmp_path / "pairs.jsonl"), "--layers", "10-12", "--output", str(tmp_path / "kind")]
    )
    assert result.exit_code == 0, result.output
    vector = read_residual(tmp_path / "kind")
    assert isinstance(vector, SteeringVector)
    assert list(vector.vectors) == [10, 11, 12]
    assert all(values.norm() > 0 for values in vector.vectors.values())
    assert "SmolLM" in str(vector.base.name) or vector.base.name == smollm2.name
    options = [
        "--layers",
        "11,12",
        "--strength",
        "4",
        "--share",
        "0.5",
        "--max-tokens",
        "3",
        "--output",
        str(tmp_path / "out"),
    ]
    rows = ["--load", f"kind={tmp_path / 'kind'}", "--adapters", "none", "--adapters", "kind:0.5"]
    result = runner.invoke(cli, ["attention", "--prompt", "Is <<the sea>> deep?", *rows, *options])
    assert result.exit_code == 0, result.output
    written = {path.name for path in (tmp_path / "out").iterdir()}
    heads = {f"heads_{row}.png" for row in range(4)}
    assert (
        written
        == {"attention.html", "text.png", "residual_1.png", *(f"changed_{row}.png" for row in (1, 2, 3))} | heads
    )
    page = (tmp_path / "out" / "attention.html").read_text()
    assert "none, strength 4" in page
    assert "none, share 0.5" in page
    assert "kind:0.5" in page


def test_inspect_shows_a_residual(smollm2: Path, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text('{"wanted": "yes", "unwanted": "no"}\n')
    runner.invoke(cli, ["vector", str(tmp_path / "pairs.jsonl"), "--layers", "3", "--output", str(tmp_path / "v")])
    table = runner.invoke(cli, ["inspect", str(tmp_path / "v")])
    assert table.exit_code == 0
    assert "steering vector" in table.output
    found = json.loads(runner.invoke(cli, ["inspect", str(tmp_path / "v"), "--json"]).output)
    assert found == json.loads(json.dumps(describe_residual(tmp_path / "v").as_json()))
    assert render_residual(describe_residual(tmp_path / "v"))
    (tmp_path / "v" / "residual_config.json").write_text("{}")
    assert isinstance(runner.invoke(cli, ["inspect", str(tmp_path / "v")]).exception, AdapterFormatError)
