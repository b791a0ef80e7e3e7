"""Every bad adapter is refused by type, with the value and the fix, and changes nothing."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loraplex import MultiLoraModel, StoreConfig
from loraplex.adapters.peft.reader import read_adapter
from loraplex.adapters.weights import Adapter, LoraWeights
from loraplex.errors import (
    AdapterExistsError,
    AdapterFormatError,
    AdapterNotFoundError,
    BaseModelMismatchError,
    CapacityError,
    NameFormatError,
    UnsupportedAdapterError,
)
from tests.models.untouched import IDS, assert_refused, five_adapters_for_three_slots
from tests.tiny_models import ARCHITECTURES, HIDDEN_SIZE, linear_targets, random_peft_adapter, tiny_model

TARGETS = ("q_proj", "v_proj")
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"
Q_A, Q_B = f"{Q_PROJ}.lora_A.weight", f"{Q_PROJ}.lora_B.weight"


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A folder that loads."""
    folder = tmp_path_factory.mktemp("good") / "adapter"
    return random_peft_adapter(tiny_model("llama"), folder, targets=TARGETS, seed=9)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> MultiLoraModel:
    return five_adapters_for_three_slots(tmp_path_factory.mktemp("loaded"))


def spoil(good: Path, folder: Path, tensors: Mapping[str, Tensor | None], settings: Mapping[str, Any]) -> Path:
    """A copy of `good` with other tensors (None: without it) and settings."""
    folder.mkdir()
    config = json.loads((good / "adapter_config.json").read_text()) | settings
    (folder / "adapter_config.json").write_text(json.dumps(config))
    changed = load_file(good / "adapter_model.safetensors") | tensors
    kept = {name: tensor for name, tensor in changed.items() if tensor is not None}
    save_file(kept, folder / "adapter_model.safetensors")
    return folder


def filled(value: float) -> Tensor:
    return torch.cat([torch.ones(4 * HIDDEN_SIZE - 1), torch.tensor([value])]).view(4, HIDDEN_SIZE)


BAD_FOLDERS = {
    "half a module missing": ({Q_B: None}, {}, AdapterFormatError, ["q_proj", "no lora_B.weight", "Save"]),
    "a module missing": ({Q_A: None, Q_B: None}, {}, AdapterFormatError, ["layers.0.self_attn.q_proj", "restore"]),
    "an unknown tensor": ({"extra": torch.ones(2)}, {}, AdapterFormatError, ["'extra'", "Known:"]),
    "an untargeted module": ({}, {"target_modules": ["v_proj"]}, AdapterFormatError, ["q_proj", "target_modules"]),
    "another rank": ({Q_A: torch.ones(5, HIDDEN_SIZE)}, {}, AdapterFormatError, ["rank 5", "must agree"]),
    "a rank that the configuration denies": ({}, {"r": 8}, AdapterFormatError, ["r=8", "rank 4", "must agree"]),
    "too many inputs": (
        {Q_A: torch.ones(4, 65)},
        {},
        BaseModelMismatchError,
        ["65 -> 64", "64 -> 64", "load that one"],
    ),
    "too few outputs": ({Q_B: torch.ones(63, 4)}, {}, BaseModelMismatchError, ["64 -> 63", "64 -> 64"]),
    "one dimension": ({Q_A: torch.ones(256)}, {}, AdapterFormatError, [Q_A, "[256]", "two dimensions"]),
    "NaN": ({Q_A: filled(math.nan)}, {}, AdapterFormatError, [Q_A, "1 NaN", "earlier checkpoint"]),
    "infinity": ({Q_A: filled(-math.inf)}, {}, AdapterFormatError, [Q_A, "1 infinite", "earlier checkpoint"]),
    "integers": ({Q_A: torch.ones(4, HIDDEN_SIZE).int()}, {}, UnsupportedAdapterError, [Q_A, "I32", "Convert"]),
    "an unsupported method": ({}, {"peft_type": "LOHA"}, UnsupportedAdapterError, ["'LOHA'", "Supported: 'LORA'"]),
    "an unknown bias": ({}, {"bias": "both"}, AdapterFormatError, ["bias is 'both'", "'lora_only'"]),
    "no module to save": ({}, {"modules_to_save": ["lm_head"]}, AdapterFormatError, ["['lm_head']", "lm_head.weight"]),
    "a rank of zero": ({}, {"r": 0}, AdapterFormatError, ["r is 0", "at least 1"]),
}


@pytest.mark.parametrize(("tensors", "settings", "error", "words"), BAD_FOLDERS.values(), ids=BAD_FOLDERS)
def test_folder_that_can_not_be_served_is_refused(model, good, tmp_path, tensors, settings, error, words):
    folder = spoil(good, tmp_path / "bad", tensors, settings)
    assert_refused(model, lambda: model.load_adapter("new", folder), error, *words)
    assert_refused(model, lambda: model.load_adapter("first", folder, replace=True), error, *words)


def test_truncated_file_is_refused(model, good, tmp_path):
    folder = spoil(good, tmp_path / "bad", {}, {})
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    words = [str(file), f"{file.stat().st_size} bytes", "download it again"]
    assert_refused(model, lambda: model.load_adapter("new", folder), AdapterFormatError, *words)
    assert_refused(model, lambda: model.load_adapter("first", folder, replace=True), AdapterFormatError, *words)


def test_pickle_file_is_refused_unread(model, good, tmp_path):
    folder = spoil(good, tmp_path / "bad", {}, {})
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    words = ["adapter_model.bin", "loraplex convert"]
    assert_refused(model, lambda: model.load_adapter("new", folder), UnsupportedAdapterError, *words)


@pytest.mark.parametrize(
    ("source", "words"),
    [("nowhere", ["'nowhere'", "does not exist"]), (Path("a/b"), ["'a/b'", "does not exist"])],
)
def test_folder_that_is_not_there_is_refused(model, source, words):
    assert_refused(model, lambda: model.load_adapter("new", source), AdapterNotFoundError, *words)


def test_adapter_of_another_hidden_size_is_refused(model, tmp_path):
    config = ARCHITECTURES["llama"].config()
    config.hidden_size, config.head_dim = 32, 8
    other = ARCHITECTURES["llama"].model_class(config)
    folder = random_peft_adapter(other, tmp_path / "bad", targets=TARGETS)
    words = ["4 of the adapter's 4 modules", "32 -> 32", "64 -> 64"]
    assert_refused(model, lambda: model.load_adapter("new", folder), BaseModelMismatchError, *words)


def test_adapter_of_another_architecture_is_refused(model, tmp_path):
    folder = random_peft_adapter(tiny_model("gpt2"), tmp_path / "bad", targets=linear_targets("gpt2"))
    words = ["transformer.h.0.attn.c_attn", "the base has, for example, 'model.embed_tokens'"]
    assert_refused(model, lambda: model.load_adapter("new", folder), BaseModelMismatchError, *words)


def with_q_proj(adapter: Adapter, **changes: Tensor) -> Adapter:
    path = "model.layers.0.self_attn.q_proj"
    old = adapter.layers[path]
    parts = {"lora_a": old.lora_a, "lora_b": old.lora_b, "magnitude": None} | changes
    new = LoraWeights(kind="linear", scaling=old.scaling, **parts)
    return Adapter(config=adapter.config, layers={**adapter.layers, path: new})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora_a": filled(math.nan)}, ["lora_a of 'model.layers.0.self_attn.q_proj'", "1 NaN"]),
        ({"lora_b": torch.ones(3, HIDDEN_SIZE)}, ["lora_a has rank 4, lora_b 3", "must agree"]),
        ({"magnitude": torch.ones(7)}, ["[7]", f"[{HIDDEN_SIZE}]"]),
    ],
)
def test_adapter_in_memory_is_checked_as_a_folder_is(model, good, changes, words):
    bad = with_q_proj(read_adapter(good), **changes)
    assert_refused(model, lambda: model.load_adapter("new", bad), AdapterFormatError, *words)


def test_name_in_use_is_refused(model, good):
    words = ["'first'", "replace=True", "another name"]
    assert_refused(model, lambda: model.load_adapter("first", good), AdapterExistsError, *words)


@pytest.mark.parametrize("name", ["", "a:b", "a+b", "a b", "é", "a" * 129, "a\n", None, 7])
def test_name_that_the_grammar_can_not_hold_is_refused(model, good, name):
    words = [repr(name), "1 to 128 characters", "another name"]
    assert_refused(model, lambda: model.load_adapter(name, good), NameFormatError, *words)


@pytest.mark.parametrize("method", ["unload", "pin"])
def test_calls_about_unknown_adapters_are_refused(model, method):
    words = ["'unknown'", "'first'", "load_adapter"]
    assert_refused(model, lambda: getattr(model, method)("unknown"), AdapterNotFoundError, *words)


def test_prefetching_an_unknown_adapter_is_refused(model):
    assert_refused(model, lambda: model.prefetch(["first", "unknown"]), AdapterNotFoundError, "'unknown'")


def test_replacement_that_does_not_fit_the_host_budget_leaves_the_old_version_serving(good, tmp_path):
    base = tiny_model("llama")
    (size,) = [state.num_bytes for state in loaded(good).adapters()]
    model = MultiLoraModel(base, store=StoreConfig(host_bytes=size))
    model.load_adapter("first", good)
    with torch.no_grad():
        before = model(IDS, adapters=["first"] * 4).logits
    large = random_peft_adapter(base, tmp_path / "large", targets=TARGETS, r=16)
    with pytest.raises(CapacityError, match=f"{size} of {size}|host_bytes"):
        model.load_adapter("first", large, replace=True)
    assert [state.version for state in model.adapters()] == [1]
    assert torch.equal(model(IDS, adapters=["first"] * 4).logits, before)


def loaded(folder: Path) -> MultiLoraModel:
    model = MultiLoraModel(tiny_model("llama"))
    model.load_adapter("first", folder)
    return model


def test_replacement_serves_the_new_weights_and_counts_versions(good, tmp_path):
    """The refusals above would hold if nothing was ever replaced."""
    model = loaded(good)
    before = first_logits(model)
    model.load_adapter(
        "first", random_peft_adapter(tiny_model("llama"), tmp_path / "v2", targets=TARGETS, seed=3), replace=True
    )
    assert [state.version for state in model.adapters()] == [2]
    assert not torch.equal(first_logits(model), before)


@torch.no_grad()
def first_logits(model: MultiLoraModel) -> Tensor:
    return model(IDS, adapters=["first"] * 4).logits
