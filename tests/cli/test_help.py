"""Help pages and errors in the command line's words, on a terminal of 80 columns."""

import re
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

import loraplex
from loraplex.cli.app import cli
from loraplex.cli.lazy import LazyCommand
from loraplex.cli.wording import in_flags
from loraplex.errors import ConfigError

WIDTH = 80


def commands(command: Any, words: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Every command by the words that call it."""
    command = command.load() if isinstance(command, LazyCommand) else command
    found = {words: command}
    for name, below in getattr(command, "commands", {}).items():
        found |= commands(below, (*words, name))
    return found


COMMANDS = commands(typer.main.get_command(cli))


def help_of(*words: str, flag: str = "--help") -> str:
    result = CliRunner().invoke(cli, [*words, flag], env={"COLUMNS": str(WIDTH), "TERMINAL_WIDTH": str(WIDTH)})
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result.output


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_shows_every_flag_whole_and_says_what_it_does(words: tuple[str, ...]) -> None:
    page = help_of(*words)
    assert help_of(*words, flag="-h") == page
    lines = page.splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert "…" not in page
    assert COMMANDS[words].help
    for parameter in COMMANDS[words].params:
        if parameter.param_type_name == "argument":
            assert any(re.match(rf"  {parameter.name.upper()}\b", line) for line in lines), parameter.name
            continue
        assert parameter.help, f"{parameter.opts} says nothing"
        told = re.sub(r"\[[^]]*\]", "", parameter.help).split()
        assert len(told) >= 2, f"{parameter.opts} says too little: {parameter.help}"
        for flag in (*parameter.opts, *parameter.secondary_opts):
            assert any(re.match(rf"  (-\w, |--[\w-]+ / |--[\w-]+, )?{flag}\b(?!-)", line) for line in lines), flag


def test_version_is_the_packages() -> None:
    assert help_of(flag="--version") == f"loraplex {loraplex.__version__}\n"


@pytest.mark.parametrize(
    ("words", "message", "told"),
    [
        ("generate", "temperature is -1; it must be", "--temperature is -1; it must be"),
        ("generate", "'max_tokens' and max_tokens is 0", "'max_tokens' and --max-tokens is 0"),
        ("generate", "n is 5000; at most", "--answers is 5000; at most"),
        ("generate", "Pass chat=False (on the command line --raw)", "Pass --raw (on the command line --raw)"),
        ("generate", "Load it: model.load_adapter('x', path).", "Load it: --load x=FOLDER."),
        ("generate", "the model is a fine model", "the model is a fine model"),
        ("train adapters", "job 'a': max_steps is 0", "job 'a': --steps is 0"),
        ("train adapters", "or pass resume=False to start over", "or pass --no-resume to start over"),
        (
            "train mixture",
            "Write layout='xlora', or train with use_bias=True.",
            "Write --layout 'xlora', or train with --use-bias.",
        ),
        ("train mixture", "has enable_softmax=False. Set", "has --no-enable-softmax. Set"),
        ("merge", "Choose another folder, or pass overwrite=True.", "Choose another folder, or pass --overwrite."),
        ("serve", "host is '::', but there is no keys_file", "--host is '::', but there is no --keys-file"),
        ("serve", "adapter_roots names 'x'", "--adapter-root names 'x'"),
    ],
)
def test_messages_name_flags(words: str, message: str, told: str) -> None:
    assert in_flags(message, COMMANDS[tuple(words.split())].params) == told


def test_an_error_inside_a_command_names_the_flag() -> None:
    arguments = ["train", "adapters", "--model", "x", "--output", "y", "--data", "a=b", "--batch-size", "0"]
    result = CliRunner().invoke(cli, arguments)
    assert isinstance(result.exception, ConfigError)
    assert "--batch-size is 0" in str(result.exception)
    assert "batch_size" not in str(result.exception)
