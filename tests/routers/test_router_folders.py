"""Mixtures with routers go into folders and come back the same; damaged and hostile folders are refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraplex import ArrowConfig, LinearRouterConfig, MultiLoraModel, SpectrConfig, StaticRouterConfig
from loraplex.errors import AdapterError, AdapterExistsError, ConfigError, MixtureError
from loraplex.routers.config import RouterConfig
from tests.tiny_models import linear_targets, random_peft_adapter, tiny_model

IDS = torch.randint(5, 60, (3, 9), generator=torch.Generator().manual_seed(3))
CONFIGS: dict[str, RouterConfig] = {
    "arrow": ArrowConfig(top_k=2, temperature=0.5, rng_seed=4),
    "general": ArrowConfig(top_k=1, general_experts=("c",)),
    "spectr": SpectrConfig(top_k=1),
    "linear": LinearRouterConfig(top_p=0.8),
    "shared": LinearRouterConfig(activation="sigmoid", shared=True),
    "static": StaticRouterConfig(gates=(0.5, -1.0)),
}


def make_model(folder: Path) -> MultiLoraModel:
    model = MultiLoraModel(tiny_model("llama"))
    for seed, name in enumerate("abc"):
        model.load_adapter(
            name, random_peft_adapter(model.base, folder / name, targets=linear_targets("llama"), seed=seed)
        )
    return model


@torch.no_grad()
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_mixture_comes_back_from_its_folder(kind: str, tmp_path: Path) -> None:
    model = make_model(tmp_path)
    model.create_mixture("m", ("a", "b"), CONFIGS[kind], seed=3)
    expected = model(IDS, adapters=["m", None, "m:0.5"]).logits
    model.save_mixture("m", tmp_path / "saved")
    fresh = MultiLoraModel(tiny_model("llama"))
    fresh.load_mixture("again", tmp_path / "saved")
    assert torch.equal(fresh(IDS, adapters=["again", None, "again:0.5"]).logits, expected)
    assert fresh.names() == ["again", "again/a", "again/b"] if kind != "general" else len(fresh.names()) == 3
    fresh.save_mixture("again", tmp_path / "saved", overwrite=True)
    fresh.unload("again")
    assert fresh.names() == []
    fresh.load_mixture("third", tmp_path / "saved")
    assert torch.equal(fresh(IDS, adapters=["third", None, "third:0.5"]).logits, expected)


@torch.no_grad()
def test_experts_may_come_from_elsewhere(tmp_path: Path) -> None:
    model = make_model(tmp_path)
    model.create_mixture("m", ("a", "b"), LinearRouterConfig(), seed=3)
    expected = model(IDS, adapters=["m"] * 3).logits
    model.save_mixture("m", tmp_path / "saved")
    model.load_mixture("other", tmp_path / "saved", experts={"a": None, "new": tmp_path / "b"})
    assert torch.equal(model(IDS, adapters=["other"] * 3).logits, expected)
    with pytest.raises(MixtureError, match="names 1 adapters"):
        model.load_mixture("third", tmp_path / "saved", experts={"a": None})


def test_x_lora_s_layouts_are_not_for_routers(tmp_path: Path) -> None:
    model = make_model(tmp_path)
    model.create_mixture("m", ("a", "b"), SpectrConfig())
    with pytest.raises(ConfigError, match="layout"):
        model.save_mixture("m", tmp_path / "saved", layout="peft")


def test_what_else_is_in_a_folder_is_not_overwritten(tmp_path: Path) -> None:
    model = make_model(tmp_path)
    model.create_mixture("m", ("a", "b"), SpectrConfig())
    model.save_mixture("m", tmp_path / "saved")
    with pytest.raises(AdapterExistsError, match="exists already"):
        model.save_mixture("m", tmp_path / "saved")
    (tmp_path / "saved" / "a" / "notes.txt").write_text("mine")
    with pytest.raises(AdapterExistsError, match=r"notes\.txt"):
        model.save_mixture("m", tmp_path / "saved", overwrite=True)
    assert (tmp_path / "saved" / "a" / "notes.txt").read_text() == "mine"


def _changed(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "router_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def _without_a_bias(folder: Path) -> None:
    tensors = load_file(folder / "router.safetensors")
    del tensors["biases.0"]
    save_file(tensors, folder / "router.safetensors")


def _wider(folder: Path) -> None:
    tensors = load_file(folder / "router.safetensors")
    save_file(tensors | {"weights.1": torch.zeros(2, 65)}, folder / "router.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_changed(format="other"), "format is 'other'"),
        (_changed(format_version=2), "version 2"),
        (_changed(router="magic"), "router is 'magic'"),
        (_changed(router=["arrow"]), "router is"),
        (_changed(settings={"top_k": 0}), "top_k is 0"),
        (_changed(settings={"general_experts": ["a"]}), "general_experts"),
        (_changed(experts=["a", "a"]), "different names"),
        (_changed(experts=["../a", "b"]), "no folder of its own"),
        (_changed(experts=["a", "a/b"]), "no folder of its own"),
        (_changed(experts=[]), "experts is"),
        (_changed(experts=["a", "zz"]), "zz"),
        (_changed(more=1), "unknown settings"),
        (_changed(layers=["model.layers.0.mlp.up_proj"]), "layers names 1 LoRA layers"),
        (_without_a_bias, r"biases\.0"),
        (_wider, r"weights\.1.*\[2, 65\]"),
        (lambda folder: (folder / "router.safetensors").write_bytes(b"x"), "not a whole safetensors file"),
        (lambda folder: (folder / "router_config.json").write_text("{"), "can't be read as JSON"),
    ],
)
def test_damaged_folder_is_refused_and_nothing_stays(
    damage: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    model = make_model(tmp_path)
    model.create_mixture("m", ("a", "b"), LinearRouterConfig())
    model.save_mixture("m", tmp_path / "saved")
    damage(tmp_path / "saved")
    names = model.names()
    with pytest.raises(AdapterError, match=message):
        model.load_mixture("again", tmp_path / "saved")
    assert model.names() == names
