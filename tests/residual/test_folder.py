"""Residual adapters as folders: read as written, refused when damaged, described."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraplex.adapters.peft.writer import write_adapter
from loraplex.errors import (
    AdapterExistsError,
    AdapterFormatError,
    AdapterNotFoundError,
    BaseModelMismatchError,
    UnsupportedAdapterError,
)
from loraplex.residual.format import CONFIG_FILE, WEIGHTS_FILE, is_residual_folder, read_residual, write_residual
from loraplex.residual.layers import AttentionLayers
from loraplex.residual.modules import FunctionResidual, LinkedResidual, SteeringVector
from loraplex.residual.registry import LinkedAttention
from loraplex.residual.report import describe_residual
from tests.residual.tiny_residuals import random_linked, random_vector
from tests.tiny_models import tiny_model


@pytest.fixture(scope="module")
def layers() -> AttentionLayers:
    return AttentionLayers(tiny_model("llama"))


@pytest.fixture
def folder(layers: AttentionLayers, tmp_path: Path) -> Path:
    write_residual(random_linked(layers, 1, at=[1]), tmp_path / "cautious")
    return tmp_path / "cautious"


def test_linked_residual_is_read_as_it_was_written(layers: AttentionLayers, folder: Path) -> None:
    written, read = random_linked(layers, 1, at=[1]), read_residual(folder)
    assert isinstance(read, LinkedResidual)
    assert (read.config, read.base, list(read.layers)) == (written.config, written.base, [1])
    for part in ("a", "b", "head_logits"):
        assert getattr(read.layers[1], part).equal(getattr(written.layers[1], part))
    assert is_residual_folder(folder)
    assert not is_residual_folder(folder.parent)


def test_vector_is_read_as_it_was_written(layers: AttentionLayers, tmp_path: Path) -> None:
    vector = random_vector(layers, 0)
    write_residual(vector, tmp_path / "v")
    read = read_residual(tmp_path / "v")
    assert isinstance(read, SteeringVector)
    assert all(read.vectors[layer].equal(vector.vectors[layer]) for layer in (0, 1))


def test_folder_is_overwritten_only_on_demand(layers: AttentionLayers, folder: Path) -> None:
    other = random_linked(layers, 2)
    with pytest.raises(AdapterExistsError, match="overwrite=True"):
        write_residual(other, folder)
    write_residual(other, folder, overwrite=True)
    assert list(read_residual(folder).layers) == [0, 1]
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(AdapterExistsError, match=r"notes\.txt"):
        write_residual(other, folder, overwrite=True)


def change_settings(**values: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = json.loads((folder / CONFIG_FILE).read_text()) | values
        content = {key: value for key, value in content.items() if value != "gone"}
        (folder / CONFIG_FILE).write_text(json.dumps(content))

    return damage


def change_tensors(name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS_FILE)
        changed = change(tensors.pop("layers.1.a"))
        save_file(tensors if changed is None else tensors | {name: changed}, folder / WEIGHTS_FILE)

    return damage


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda folder: (folder / WEIGHTS_FILE).unlink(), AdapterFormatError, WEIGHTS_FILE),
        (lambda folder: (folder / CONFIG_FILE).write_text("{"), AdapterFormatError, "JSON"),
        (lambda folder: (folder / WEIGHTS_FILE).write_bytes(b"12345678"), AdapterFormatError, "safetensors"),
        (change_settings(format_version=3), UnsupportedAdapterError, "format_version 3"),
        (change_settings(format="other"), AdapterFormatError, "'other'"),
        (change_settings(kind="other"), UnsupportedAdapterError, "'other'"),
        (change_settings(dropout=0.1), AdapterFormatError, "dropout"),
        (change_settings(alpha="gone"), AdapterFormatError, "alpha"),
        (change_settings(r=0), AdapterFormatError, "rank"),
        (change_settings(r=4), AdapterFormatError, "shape"),
        (change_settings(layers=[1, 1]), AdapterFormatError, "twice"),
        (change_settings(layers=[5]), AdapterFormatError, "layer 5"),
        (change_settings(base={}), AdapterFormatError, "architecture"),
        (change_tensors("layers.1.a", lambda a: None), AdapterFormatError, "missing"),
        (change_tensors("layers.1.c", lambda a: a), AdapterFormatError, "extra"),
        (change_tensors("layers.1.a", lambda a: a[:, :-1].contiguous()), AdapterFormatError, "shape"),
        (change_tensors("layers.1.a", lambda a: a * float("nan")), AdapterFormatError, "NaN"),
    ],
)
def test_damaged_folder_is_refused(
    folder: Path, damage: Callable[[Path], None], error: type[Exception], message: str
) -> None:
    damage(folder)
    with pytest.raises(error, match=message):
        read_residual(folder)


def test_what_could_not_be_read_is_not_written(layers: AttentionLayers, tmp_path: Path) -> None:
    residual = random_linked(layers, 1)
    residual.layers[0].b[0, 0] = float("inf")
    with pytest.raises(AdapterFormatError, match=r"layers\.0\.b"):
        write_residual(residual, tmp_path / "r")
    with pytest.raises(UnsupportedAdapterError, match="Python code"):
        write_residual(FunctionResidual(function=lambda hidden, attention, context: hidden), tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_export_to_peft_is_refused_with_the_reason(layers: AttentionLayers, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedAdapterError, match="what a token attends to"):
        write_adapter(random_linked(layers, 1), tmp_path / "r")  # type: ignore[arg-type]
    with pytest.raises(UnsupportedAdapterError, match="constant"):
        write_adapter(random_vector(layers, 1), tmp_path / "r")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_report_tells_norms_and_heads(layers: AttentionLayers, folder: Path) -> None:
    residual = random_linked(layers, 1, at=[1])
    report = describe_residual(folder)
    (layer,) = report.layers
    weights = residual.layers[1]
    update = residual.config.scaling * weights.b.t() @ weights.a
    mix = torch.softmax(weights.head_logits, dim=-1)
    assert layer.norm == pytest.approx(update.norm().item(), rel=1e-5)
    assert layer.top_head == int(mix.mean(dim=0).argmax())
    assert layer.head_entropy is not None
    assert 0 < layer.head_entropy < 1
    assert (report.kind, report.r, report.num_parameters) == ("linked residual", 3, 3 * (64 + 64 + 4))
    assert json.loads(json.dumps(report.as_json()))["layers"][0]["layer"] == 1


def test_registry_splits_links_and_refuses_what_does_not_fit(layers: AttentionLayers, folder: Path) -> None:
    base = tiny_model("llama")
    linked = LinkedAttention(base)
    assert base.config._attn_implementation == "sdpa", "nothing is attached before it is needed"
    linked.add("team/cautious", folder)
    others, chains = linked.split([(), (("protein", 1.0), ("team/cautious", 0.5)), (("protein", 2.0),)])
    assert others == [(), (("protein", 1.0),), (("protein", 2.0),)]
    assert [[(link.name, link.weight) for link in chain] for chain in chains] == [[], [("team/cautious", 0.5)], []]
    with pytest.raises(AdapterExistsError, match="replace=True"):
        linked.add("team/cautious", folder)
    with pytest.raises(BaseModelMismatchError):
        linked.add("other", random_linked(AttentionLayers(tiny_model("gpt2")), 1))
    assert linked.names() == ["team/cautious"]
    linked.remove("team/cautious")
    with pytest.raises(AdapterNotFoundError, match="team/cautious"):
        linked.remove("team/cautious")
    linked.detach()
    assert base.config._attn_implementation == "sdpa"
