"""`loraplex merge` and `loraplex link`."""

import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from loraplex import MultiLoraModel
from loraplex.adapters.peft.reader import read_adapter
from loraplex.adapters.peft.writer import write_adapter
from loraplex.bench.random_adapters import random_adapter, tiny_llama
from loraplex.cli.app import cli
from loraplex.errors import (
    AdapterExistsError,
    AdapterNotFoundError,
    ConfigError,
    LoraplexError,
    UnsupportedAdapterError,
)
from loraplex.models.checkpoints.loading import load_base_model

LINK = "a:0.7+b:-0.3"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model on disk with two adapters of different ranks."""
    folder = tmp_path_factory.mktemp("merge")
    base = tiny_llama()
    base.save_pretrained(folder / "model")
    with MultiLoraModel(base) as model:
        shapes = model.adaptable.shapes
    for seed, (name, rank) in enumerate({"a": 4, "b": 6}.items()):
        write_adapter(random_adapter(shapes, rank, torch.float32, seed, std_b=0.3), folder / name)
    return folder


def invoke(folder: Path, command: str, *arguments: str, option: str = "--load") -> Result:
    load = [word for name in "ab" for word in (option, f"{name}={folder / name}")]
    positional = [str(folder / "model")] if command == "merge" else []
    return CliRunner().invoke(cli, [command, *positional, *arguments, *load], env={"COLUMNS": "80"})


@torch.no_grad()
def logits(base: Path, adapters: dict[str, Path], row: str | None) -> torch.Tensor:
    with MultiLoraModel(load_base_model(base)[0]) as model:
        for name, path in adapters.items():
            model.load_adapter(name, path)
        return model(torch.arange(2, 12)[None], adapters=[row]).logits


@pytest.mark.parametrize("option", ["--load", "--adapter"])
def test_merged_model_and_linked_adapter_compute_what_the_link_does(folder: Path, tmp_path: Path, option: str) -> None:
    for command in ("merge", "link"):
        result = invoke(folder, command, LINK, str(tmp_path / command), option=option)
        assert result.exit_code == 0, result.output + repr(result.exception)
        assert str(tmp_path / command) in result.output
    expected = logits(folder / "model", {name: folder / name for name in "ab"}, LINK)
    assert torch.allclose(logits(tmp_path / "merge", {}, None), expected, atol=1e-3)
    assert torch.allclose(logits(folder / "model", {"linked": tmp_path / "link"}, "linked"), expected, atol=1e-3)
    assert not torch.allclose(logits(folder / "model", {}, None), expected, atol=1)


def test_options_of_a_combination_decide_what_is_written(folder: Path, tmp_path: Path) -> None:
    result = invoke(
        folder,
        *("link", LINK, str(tmp_path / "linked"), "--combination", "dare_ties_svd", "--density", "0.5", "--rank", "3"),
        *("--majority-sign", "frequency", "--seed", "5", "--dtype", "bfloat16"),
    )
    assert result.exit_code == 0, result.output + repr(result.exception)
    assert "rank 3" in result.output
    layers = read_adapter(tmp_path / "linked").layers.values()
    assert {(weights.rank, weights.lora_a.dtype) for weights in layers} == {(3, torch.bfloat16)}


def test_dtype_is_that_of_the_merged_model(folder: Path, tmp_path: Path) -> None:
    result = invoke(folder, "merge", LINK, str(tmp_path / "merged"), "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output + repr(result.exception)
    assert load_base_model(tmp_path / "merged")[0].dtype == torch.bfloat16


@pytest.mark.parametrize("command", ["merge", "link"])
def test_a_folder_is_replaced_with_overwrite_alone(folder: Path, tmp_path: Path, command: str) -> None:
    goal = str(tmp_path / "goal")
    assert invoke(folder, command, LINK, goal).exit_code == 0
    assert isinstance(invoke(folder, command, LINK, goal).exception, AdapterExistsError)
    assert invoke(folder, command, LINK, goal, "--overwrite").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["link", "a+c"], AdapterNotFoundError),
        (["merge", "a+c"], AdapterNotFoundError),
        (["link", LINK, "--combination", "ties"], ConfigError),
        (["link", LINK, "--dtype", "int8"], ConfigError),
        (["merge", LINK, "--dtype", "int8"], ConfigError),
        (["link", LINK, "--combination", "linear"], ConfigError),  # ranks differ
    ],
)
def test_errors_are_typed_and_nothing_is_written(
    folder: Path, tmp_path: Path, arguments: list[str], error: type[LoraplexError]
) -> None:
    command, link, *options = arguments
    result = invoke(folder, command, link, str(tmp_path / "goal"), *options)
    assert type(result.exception) is error
    assert list(tmp_path.iterdir()) == []


def test_a_mixture_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "xlora_config.json").write_text("{}")
    load = ["--load", f"a={folder / 'a'}", "--load", f"b={tmp_path / 'b'}"]
    result = CliRunner().invoke(cli, ["merge", str(folder / "model"), "a+b", str(tmp_path / "goal"), *load])
    assert isinstance(result.exception, UnsupportedAdapterError)
    assert re.search("'b' is a mixture", str(result.exception))
