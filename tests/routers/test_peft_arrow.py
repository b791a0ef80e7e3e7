"""What PEFT's `create_arrow_model` saves is loaded as a mixture that computes what PEFT's model did."""

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from loraplex import ArrowConfig, MultiLoraModel
from loraplex.errors import AdapterError, AdapterFormatError, UnsupportedAdapterError
from tests.tiny_models import linear_targets, random_peft_adapter, tiny_model

IDS = torch.randint(5, 60, (3, 9), generator=torch.Generator().manual_seed(3))


def saved(folder: Path, **settings: Any) -> Any:
    """PEFT's model of three experts and two general ones, saved after its first call."""
    base = tiny_model("llama")
    paths = [
        str(random_peft_adapter(base, folder / str(i), targets=linear_targets("llama"), seed=i, r=4)) for i in range(5)
    ]
    config = peft.tuners.lora.ArrowConfig(**{"top_k": 2, "router_temperature": 0.5, "rng_seed": 3} | settings)
    model = peft.tuners.lora.create_arrow_model(base, paths[:3], config, paths[3:]).eval()
    with torch.no_grad():
        model(IDS)
    model.save_pretrained(folder / "saved")
    return model


def loaded(folder: Path) -> MultiLoraModel:
    model = MultiLoraModel(tiny_model("llama"))
    model.load_mixture("arrow", folder)
    return model


@torch.no_grad()
def test_a_saved_arrow_is_pefts_and_can_be_saved_as_ours(tmp_path: Path) -> None:
    expected = saved(tmp_path)(IDS).logits
    model = loaded(tmp_path / "saved")
    assert model.names() == ["arrow", "arrow/task_0", "arrow/task_1", "arrow/task_2"]
    assert model.mixtures.get("arrow").config == ArrowConfig(top_k=2, temperature=0.5, rng_seed=3)
    found = model(IDS, adapters=["arrow", None, "arrow"]).logits
    assert float((found[0] - expected[0]).abs().max()) < 1e-4 * float(expected.max() - expected.min())
    assert float((found[1] - expected[1]).abs().max()) > 1e-2 * float(expected.max() - expected.min())
    model.save_mixture("arrow", tmp_path / "ours")
    assert torch.equal(loaded(tmp_path / "ours")(IDS, adapters=["arrow", None, "arrow"]).logits, found)


def test_settings_that_peft_leaves_out_have_its_defaults(tmp_path: Path) -> None:
    saved(tmp_path)
    change(tmp_path, lambda settings: settings.update(rng_seed=None))
    change(tmp_path, lambda settings: settings.pop("top_k"))
    model = loaded(tmp_path / "saved")
    assert model.mixtures.get("arrow").config == ArrowConfig(top_k=3, temperature=0.5, rng_seed=0)


def test_subtracted_general_experts_are_refused_because_files_dont_tell_when(tmp_path: Path) -> None:
    saved(tmp_path, use_gks=True)
    with pytest.raises(UnsupportedAdapterError, match=r"use_gks .*general_experts where"):
        loaded(tmp_path / "saved")


def test_an_expert_that_was_added_later_is_refused_by_name(tmp_path: Path) -> None:
    model = saved(tmp_path)
    model.load_adapter(str(tmp_path / "4"), "later")
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(UnsupportedAdapterError, match="'later'"):
        loaded(tmp_path / "saved")


DAMAGED: dict[str, tuple[Any, type[AdapterError], str]] = {
    "no settings": (lambda s: s.clear(), AdapterFormatError, "task_adapter_names"),
    "unknown": (lambda s: s.update(new=1), UnsupportedAdapterError, "new"),
    "temperature": (lambda s: s.update(router_temperature=0), AdapterFormatError, "temperature"),
    "outside": (lambda s: s.update(task_adapter_names=["../0"]), AdapterError, r"\.\./0|holds"),
    "missing": (
        lambda s: s["task_adapter_names"].append("task_9"),
        AdapterError,
        "task_9",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_settings_are_refused_by_name(name: str, tmp_path: Path) -> None:
    damage, error, words = DAMAGED[name]
    saved(tmp_path)
    change(tmp_path, damage)
    model = MultiLoraModel(tiny_model("llama"))
    with pytest.raises(error, match=words):
        model.load_mixture("arrow", tmp_path / "saved")
    assert model.names() == []


def change(folder: Path, damage: Any) -> None:
    file = folder / "saved" / "arrow_router" / "adapter_config.json"
    content = json.loads(file.read_text())
    damage(content["arrow_config"])
    file.write_text(json.dumps(content))


def test_loading_it_as_an_adapter_says_how_it_is_loaded(tmp_path: Path) -> None:
    saved(tmp_path)
    model = MultiLoraModel(tiny_model("llama"))
    with pytest.raises(UnsupportedAdapterError, match="load_mixture"):
        model.load_adapter("arrow", tmp_path / "saved")
    with pytest.raises(UnsupportedAdapterError, match="load_mixture"):
        model.load_adapter("arrow", tmp_path / "saved" / "arrow_router")
    shutil.rmtree(tmp_path / "saved" / "arrow_router")
    model.load_adapter("one", tmp_path / "saved" / "task_0")
