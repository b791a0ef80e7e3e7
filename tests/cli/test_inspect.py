import json
import shutil
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from loraplex import ArrowConfig, LinearRouterConfig, MultiLoraModel, XLoraConfig
from loraplex.adapters.inspect import describe
from loraplex.adapters.peft.reader import read_adapter
from loraplex.adapters.peft.writer import write_adapter
from loraplex.bench.random_adapters import random_adapter, tiny_llama
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


def products(folders: list[Path]) -> torch.Tensor:
    """<U, V> of the updates, formed whole in float64."""
    updates = []
    for folder in folders:
        layers = read_adapter(folder).layers
        parts = [
            own.scaling * (own.lora_b.double().T @ own.lora_a.double()).flatten() for _, own in sorted(layers.items())
        ]
        updates.append(torch.cat(parts))
    stacked = torch.stack(updates)
    return stacked @ stacked.T


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters with updates, an X-LoRA of both in each layout, and one with each kind of router."""
    folder = tmp_path_factory.mktemp("mixtures")
    model = MultiLoraModel(tiny_llama())
    for seed, name in enumerate("ab"):
        write_adapter(random_adapter(model.adaptable.shapes, 4, model.dtype, seed, std_b=0.3), folder / name)
        model.load_adapter(name, folder / name)
    configs = {
        "x": XLoraConfig(layerwise_scalings=True, xlora_depth=2, xlora_size=16),
        "arrow": ArrowConfig(top_k=1),
        "linear": LinearRouterConfig(shared=True),
    }
    for name, config in configs.items():
        model.create_mixture(name, ["a", "b"], config)
        model.save_mixture(name, folder / name)
    return folder


@pytest.mark.parametrize(("name", "kind"), [("x", "X-LoRA in PEFT"), ("arrow", "arrow"), ("linear", "linear router")])
def test_mixture_shows_its_settings_and_experts_within_80_columns(
    app: typer.Typer, trained: Path, name: str, kind: str
) -> None:
    result = CliRunner().invoke(app, [str(trained / name)], env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output + repr(result.exception)
    lines = result.output.splitlines()
    assert max(map(len, lines)) <= 80
    gram = products([trained / "a", trained / "b"])
    norm, cosine = float(gram[0, 0].sqrt()), float(gram[0, 1] / (gram[0, 0] * gram[1, 1]).sqrt())
    for words in ([kind], ["a", "LoRA", "4", f"{norm:.4g}"], ["a", "1.000", f"{cosine:.3f}"]):
        assert any(all(word in line for word in words) for line in lines), words
    report = json.loads(CliRunner().invoke(app, [str(trained / name), "--json"]).output)
    assert [part["name"] for part in report["parts"]] == ["a", "b"]
    assert (report["num_parameters"] > 0) == (name != "arrow")


def test_link_shows_its_members_and_the_norm_of_its_sum(app: typer.Typer, trained: Path) -> None:
    load = [word for name in "ab" for word in ("--load", f"{name}={trained / name}")]
    result = CliRunner().invoke(app, ["a:0.7+b:-0.5", *load, "--json"])
    assert result.exit_code == 0, result.output + repr(result.exception)
    report = json.loads(result.output)
    gram = products([trained / "a", trained / "b"])
    weights = torch.tensor([0.7, -0.5], dtype=torch.float64)
    assert report["norm"] == pytest.approx(float((weights @ gram @ weights).sqrt()), rel=1e-9)
    assert [part["weight"] for part in report["parts"]] == [0.7, -0.5]
    shown = CliRunner().invoke(app, ["a:0.7+b:-0.5", *load], env={"COLUMNS": "80"}).output
    assert "8 in all" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_router_without_its_experts_is_described_all_the_same(app: typer.Typer, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "linear", tmp_path / "alone")
    for name in "ab":
        shutil.rmtree(tmp_path / "alone" / name)
    result = CliRunner().invoke(app, [str(tmp_path / "alone")], env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output + repr(result.exception)
    assert result.output.count("not here") == 2
