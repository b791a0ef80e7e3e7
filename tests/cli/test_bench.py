"""`loraplex bench engine`: tables, files, and the status of a churn that finds something."""

import json

import pytest
import typer
from typer.testing import CliRunner

from loraplex.bench.churn_report import ChurnReport
from loraplex.cli import bench_engine
from loraplex.cli.app import cli
from loraplex.cli.bench_engine import read_case

runner = CliRunner()
LOAD = ["--adapters", "3", "--host-adapters", "2", "--seconds", "0.3", "--prompt-tokens", "4", "--new-tokens", "2"]


@pytest.mark.parametrize(
    ("arguments", "shown", "key"),
    [
        (["decode", "--case", "float32:2", "--side", "base", "--side", "adapters", "--new-tokens", "3"], "decoding", 0),
        (["prefix", "--dtype", "float32", "--prefix-tokens", "40", "--requests", "3"], "that share 40", "later"),
        (["load", "--dtype", "float32", *LOAD], "open loop", "zipf"),
        (["churn", "--requests", "40"], "40 requests", "finished"),
    ],
)
def test_workload_is_measured_shown_and_saved(tmp_path, arguments, shown, key):
    output = tmp_path / "folder" / "result.json"
    result = runner.invoke(cli, ["bench", "engine", *arguments, "--model", "tiny", "--output", str(output)])
    assert result.exit_code == 0, result.output + repr(result.exception)
    assert shown in result.stdout
    content = json.loads(output.read_text())
    assert content["results"][key] != {}
    assert content["workload"]["model"] == "tiny"
    assert {"cpu", "cores", "commit", "date", "versions"} <= content["environment"].keys()


def test_churn_with_problems_ends_with_status_1(tmp_path, monkeypatch):
    report = ChurnReport(finished=40, problems=["3 blocks are still held"])
    monkeypatch.setattr(bench_engine, "run_churn", lambda bench, tell: report)
    result = runner.invoke(cli, ["bench", "engine", "churn", "--output", str(tmp_path / "churn.json")])
    assert result.exit_code == 1
    assert "3 blocks are still held" in result.stdout


@pytest.mark.parametrize("case", ["float32", "float32:", ":8", "float32:x"])
def test_malformed_cases_are_refused(case):
    with pytest.raises(typer.BadParameter, match="DTYPE:ROWS"):
        read_case(case)
