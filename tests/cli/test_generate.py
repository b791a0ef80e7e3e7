"""`loraplex generate` and the app around it."""

import json

import pytest
import typer
from typer.testing import CliRunner

from loraplex.cli.app import cli
from loraplex.cli.errors import run
from loraplex.cli.generate import pair_rows, sampling
from loraplex.cli.options import named_values
from loraplex.errors import AdapterNotFoundError

runner = CliRunner()


@pytest.mark.parametrize(
    ("prompts", "adapters", "rows"),
    [
        (["p"], [], [("p", "none")]),
        (["p", "q"], [], [("p", "none"), ("q", "none")]),
        (["p"], ["a", "b:0.5"], [("p", "a"), ("p", "b:0.5")]),
        (["p", "q"], ["a", "none"], [("p", "a"), ("q", "none")]),
    ],
)
def test_prompts_and_adapters_become_rows(prompts, adapters, rows):
    assert pair_rows(prompts, adapters) == rows


def test_unequal_numbers_of_prompts_and_adapters_are_refused():
    with pytest.raises(typer.BadParameter, match="3 prompts but 2"):
        pair_rows(["p", "q", "r"], ["a", "b"])


@pytest.mark.parametrize("options", [["a"], ["=x"], ["a="], ["a=1", "a=2"]])
def test_malformed_names_are_refused(options):
    with pytest.raises(typer.BadParameter, match="--load"):
        named_values(options, "--load")


def test_zero_temperature_is_greedy_and_others_sample_from_everything():
    assert sampling(0.0, 1.0, 0) == {"do_sample": False}
    assert sampling(0.7, 0.9, 0) == {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 0}


def test_real_model_answers_on_the_command_line(smollm2):
    result = runner.invoke(cli, ["generate", "What is the capital of France?", "--json", "--max-tokens", "12"])
    assert result.exit_code == 0, result.output
    (answer,) = json.loads(result.stdout)
    assert "Paris" in answer["text"]
    assert answer["adapters"] is None


def test_error_is_shown_without_a_traceback(capsys):
    def fail() -> None:
        raise AdapterNotFoundError("adapter 'x' is not loaded")

    with pytest.raises(SystemExit) as stop:
        run(fail)
    assert stop.value.code == 1
    shown = capsys.readouterr().err
    assert "AdapterNotFoundError" in shown
    assert "adapter 'x' is not loaded" in shown
    assert "Traceback" not in shown


def test_debug_variable_lets_the_traceback_through(monkeypatch):
    monkeypatch.setenv("LORAPLEX_DEBUG", "1")

    def fail() -> None:
        raise AdapterNotFoundError("x")

    with pytest.raises(AdapterNotFoundError):
        run(fail)


@pytest.mark.parametrize("command", [[], ["demo"], ["generate"], ["inspect"], ["train", "adapters"]])
def test_every_command_explains_itself(command):
    result = runner.invoke(cli, [*command, "--help"])
    assert result.exit_code == 0
    assert "Usage" in result.output
