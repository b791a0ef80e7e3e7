"""Folders of the original package as they were published in 2024, compared with the package's own logits."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loraplex import MultiLoraModel
from loraplex.errors import AdapterFormatError, LoraplexError, MixtureError, UnsupportedAdapterError
from loraplex.xlora.formats.folders import read_mixture_folder
from tests.parity.oracle import assert_close
from tests.xlora.mixtures import change_json
from tests.xlora.original_package import IDS, SHAPES, base_model, known_logits, write_published

ZEPHYR = SHAPES["zephyr"]


def load(name: str, folder: Path, **options: Any) -> tuple[Tensor, list[str]]:
    """The logits of a row with the mixture, and what is loaded."""
    with MultiLoraModel(base_model(SHAPES[name]), fast_decode=False) as model:
        model.load_mixture("x", folder, **options)
        return model(IDS, adapters=["x"]).logits[0], model.names()


@pytest.mark.parametrize("name", SHAPES)
def test_published_folder_computes_what_the_original_package_computes(name: str, tmp_path: Path) -> None:
    shape = SHAPES[name]
    folder = write_published(shape, tmp_path)
    needs_order = "adapters" in shape.absent
    logits, names = load(name, folder, experts=shape.experts if needs_order else None)
    assert names == sorted(["x", *(f"x/{expert}" for expert in shape.experts)])
    assert_close(logits, known_logits(name), name)
    with torch.no_grad():
        plain = base_model(shape)(input_ids=IDS).logits[0]
    assert (plain - known_logits(name)).abs().max() > 0.1  # or the comparison would be empty


def test_order_of_the_experts_matters_for_the_comparison(tmp_path: Path) -> None:
    logits, _ = load("zephyr", write_published(ZEPHYR, tmp_path), experts=ZEPHYR.experts[::-1])
    with pytest.raises(AssertionError, match="off by"):
        assert_close(logits, known_logits("zephyr"), "reversed")


def ordering(**changes: Any) -> str:
    """mistral.rs's file for the mixture."""
    modules = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj"]
    layers = [f"model.layers.{block}.{module}" for block in range(2) for module in modules]
    content = {"order": ZEPHYR.experts, "layers": {path: i for i, path in enumerate(layers)}, "base_model_id": "x"}
    return json.dumps(content | changes)


def test_order_of_the_experts_is_read_from_the_ordering_file_of_mistral_rs(tmp_path: Path) -> None:
    folder = write_published(ZEPHYR, tmp_path)
    (folder / "xlora-paper-ordering.json").write_text(ordering())
    logits, _ = load("zephyr", folder)
    assert_close(logits, known_logits("zephyr"), "ordering")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (ordering(order=[]), "order is"),
        (ordering(order="adapter_1"), "order is"),
        (ordering(layers={"a": 0, "b": 2}), "each once"),
        (ordering(layers=[1]), "each once"),
        (ordering(layers={"model.layers.0.self_attn.q_proj": 0}), "has 1 LoRA layers, its experts adapt 10"),
        (
            ordering(layers={f"model.layers.{block}.self_attn.q_proj": block for block in range(10)}),
            "layer 1 is 'model.layers.1.self_attn.q_proj' and 'model.layers.0.self_attn.k_proj'",
        ),
        ("{", "JSON"),
    ],
)
def test_ordering_file_that_does_not_fit_is_refused(content: str, message: str, tmp_path: Path) -> None:
    folder = write_published(ZEPHYR, tmp_path)
    (folder / "ordering.json").write_text(content)
    with MultiLoraModel(base_model(ZEPHYR)) as model:
        with pytest.raises(AdapterFormatError, match=message):
            model.load_mixture("x", folder)
        assert model.names() == []


def test_experts_without_an_order_are_refused_with_their_names(tmp_path: Path) -> None:
    with pytest.raises(AdapterFormatError, match=r"adapters is None.*'adapter_1', 'adapter_2'.*experts=\["):
        read_mixture_folder(write_published(ZEPHYR, tmp_path))


def test_experts_from_elsewhere_need_no_list_in_the_folder(tmp_path: Path) -> None:
    folder = write_published(ZEPHYR, tmp_path / "mixture")
    logits, names = load("zephyr", folder, experts={f"e/{name}": folder / name for name in ZEPHYR.experts})
    assert names == sorted(["x", *(f"e/{name}" for name in ZEPHYR.experts)])
    assert_close(logits, known_logits("zephyr"), "elsewhere")


def test_order_that_the_folder_contradicts_is_refused(tmp_path: Path) -> None:
    folder = write_published(SHAPES["last"], tmp_path)
    load("last", folder, experts=SHAPES["last"].experts)
    for experts in (SHAPES["last"].experts[::-1], SHAPES["last"].experts[:2], "adapter_1"):
        with pytest.raises(MixtureError, match="the folder of mixture 'x' says"):
            load("last", folder, experts=experts)


def test_head_of_depth_2_without_its_setting_is_refused_where_its_age_does_not_tell(tmp_path: Path) -> None:
    folder = write_published(SHAPES["last"], tmp_path)
    change_json(folder / "xlora_config.json", {}, drop=("enable_relu_and_dropout",))
    with pytest.raises(UnsupportedAdapterError, match=r"enable_relu_and_dropout.*2024-04-11"):
        read_mixture_folder(folder)
    for changes, drop in (
        ({"adapters": dict.fromkeys(SHAPES["last"].experts, "x")}, ()),
        ({"stop_token_id": None}, ()),
        ({}, ("base_model_id",)),
    ):
        change_json(folder / "xlora_config.json", changes, drop=drop)
        assert not read_mixture_folder(folder).config.enable_relu_and_dropout


def test_head_with_biases_in_some_layers_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = write_published(SHAPES["gemma"], tmp_path)
    change_json(folder / "xlora_config.json", {}, drop=("use_bias",))
    assert read_mixture_folder(folder).config.use_bias
    tensors = load_file(folder / "xlora_classifier.safetensors")
    del tensors["last.bias"]
    save_file(tensors, folder / "xlora_classifier.safetensors")
    with pytest.raises(UnsupportedAdapterError, match="no biases in 'last'"):
        read_mixture_folder(folder)


def test_mixture_and_adapter_are_told_apart_by_the_calls_that_load_them(tmp_path: Path) -> None:
    folder = write_published(SHAPES["last"], tmp_path)
    with MultiLoraModel(base_model(SHAPES["last"])) as model:
        with pytest.raises(UnsupportedAdapterError, match="load_mixture"):
            model.load_adapter("x", folder)
        with pytest.raises(LoraplexError, match="load_adapter"):
            model.load_mixture("x", folder / "adapter_1")
        assert model.names() == []
