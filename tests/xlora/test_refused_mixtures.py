"""Mixture folders that can't be read exactly, each refused with its reason."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loraplex.errors import AdapterFormatError, AdapterNotFoundError, UnsupportedAdapterError
from loraplex.xlora.config import XLoraConfig
from loraplex.xlora.formats.folders import read_mixture_folder
from loraplex.xlora.formats.head_tensors import check_head
from loraplex.xlora.formats.mixture_folder import Layout
from tests.xlora.mixtures import HIDDEN, change_json, head_state, write_mixture

CONFIG = XLoraConfig(xlora_depth=2, xlora_size=12, layerwise_scalings=True)
SETTINGS = {"peft": "adapter_config.json", "xlora": "xlora_config.json"}
HEAD = {"peft": "adapter_model.safetensors", "xlora": "xlora_classifier.safetensors"}
FIRST = {"peft": "base_model.internal_xlora_classifier.layers.0", "xlora": "inner.0"}
LAYOUTS: list[Layout] = ["peft", "xlora"]


def change_head(folder: Path, layout: Layout, change: Callable[[dict[str, Tensor]], object]) -> None:
    file = folder / HEAD[layout]
    tensors = load_file(file)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> Layout:
    return request.param


@pytest.fixture
def folder(layout: Layout, tmp_path: Path) -> Path:
    return write_mixture(tmp_path / "mix", layout, CONFIG)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"xlora_depth": 0}, AdapterFormatError, "xlora_depth is 0"),
        ({"softmax_temperature": -1}, AdapterFormatError, "softmax_temperature is -1"),
        ({"top_k_lora": 4}, AdapterFormatError, "top_k_lora is 4, but the mixture has 3 experts"),
        ({"top_k_lora": 0}, AdapterFormatError, "top_k_lora is 0"),
        ({"enable_softmax_topk": True}, AdapterFormatError, "top_k_lora is None"),
        ({"layerwise_scalings": 1}, AdapterFormatError, "layerwise_scalings is 1"),
        ({"hidden_size": None}, AdapterFormatError, "hidden_size is None"),
        ({"hidden_size": 32}, AdapterFormatError, r"is \[12, 16\] instead of \[12, 32\]"),
        ({"xlora_size": 24}, AdapterFormatError, r"is \[12, 16\] instead of \[24, 16\]"),
        ({"xlora_depth": 1}, AdapterFormatError, "no scaling head with xlora_depth=1"),
        ({"layerwise_scalings": False}, AdapterFormatError, r"is \[9, 12\] instead of \[3, 12\]"),
        ({"gating_noise": 0.1}, UnsupportedAdapterError, r"unknown settings \{'gating_noise': 0.1\}"),
        ({"adapters": {}}, AdapterFormatError, r"adapters is [{\[]"),
        ({"adapters": None}, AdapterFormatError, "adapters is None"),
    ],
)
def test_settings(folder: Path, layout: Layout, settings: dict[str, Any], error: type, message: str) -> None:
    change_json(folder / SETTINGS[layout], settings)
    with pytest.raises(error, match=message):
        read_mixture_folder(folder)


def test_depth_without_its_tensors_lists_them_all(folder: Path, layout: Layout) -> None:
    change_json(folder / SETTINGS[layout], {"xlora_depth": 4})
    missing = {"peft": r"layers\.6\.weight'.*layers\.9\.bias'", "xlora": r"inner\.3\.weight'.*inner\.6\.bias'"}
    with pytest.raises(AdapterFormatError, match=rf"lacks '.*{missing[layout]}.*8 tensors, 4 of them"):
        read_mixture_folder(folder)


def test_missing_tensor(folder: Path, layout: Layout) -> None:
    change_head(folder, layout, lambda tensors: tensors.pop(f"{FIRST[layout]}.bias"))
    with pytest.raises(AdapterFormatError, match=rf"lacks '{FIRST[layout]}\.bias'.*4 tensors, 3 of them are there"):
        read_mixture_folder(folder)


def test_extra_tensor(folder: Path, layout: Layout) -> None:
    change_head(folder, layout, lambda tensors: tensors.update(another=torch.zeros(2)))
    with pytest.raises(AdapterFormatError, match=r"no scaling head with .* has: 'another'"):
        read_mixture_folder(folder)


def test_misshaped_tensor(folder: Path, layout: Layout) -> None:
    change_head(folder, layout, lambda tensors: tensors.update({f"{FIRST[layout]}.weight": torch.zeros(12, 15)}))
    with pytest.raises(AdapterFormatError, match=rf"'{FIRST[layout]}\.weight' is \[12, 15\] instead of \[12, 16\]"):
        read_mixture_folder(folder)


@pytest.mark.parametrize(("value", "message"), [(float("nan"), "1 NaN"), (float("inf"), "1 infinite")])
def test_weights_that_are_no_numbers(folder: Path, layout: Layout, value: float, message: str) -> None:
    change_head(folder, layout, lambda tensors: tensors[f"{FIRST[layout]}.weight"][2].__setitem__(3, value))
    with pytest.raises(AdapterFormatError, match=rf"{FIRST[layout]}\.weight' holds .*{message}"):
        read_mixture_folder(folder)


def test_whole_numbers_are_no_weights(folder: Path, layout: Layout) -> None:
    name = f"{FIRST[layout]}.bias"
    change_head(folder, layout, lambda tensors: tensors.update({name: torch.zeros(12, dtype=torch.int32)}))
    with pytest.raises(UnsupportedAdapterError, match="has dtype I32"):
        read_mixture_folder(folder)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_head(folder: Path, layout: Layout, keep: int) -> None:
    file = folder / HEAD[layout]
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(AdapterFormatError, match="not a whole safetensors file"):
        read_mixture_folder(folder)


def test_pickled_head(folder: Path, layout: Layout) -> None:
    (folder / HEAD[layout]).unlink()
    with pytest.raises(AdapterFormatError, match=f"has no {HEAD[layout]}, which holds the scaling head"):
        read_mixture_folder(folder)
    pickle = {"peft": "adapter_model.bin", "xlora": "xlora_classifier.pt"}[layout]
    (folder / pickle).write_bytes(b"never read")
    with pytest.raises(UnsupportedAdapterError, match=f"pickle file \\('{pickle}'\\)"):
        read_mixture_folder(folder)


def test_layerwise_head_for_another_number_of_experts(folder: Path, layout: Layout) -> None:
    adapters = {"peft": {"0": "a", "1": "b"}, "xlora": ["protein", "chemistry"]}[layout]
    change_json(folder / SETTINGS[layout], {"adapters": adapters})
    (folder / "loraplex.json").unlink(missing_ok=True)
    with pytest.raises(AdapterFormatError, match="9 outputs, which is not a multiple of the 2 experts"):
        read_mixture_folder(folder)


@pytest.mark.parametrize("text", ["", "[1]", "{"])
def test_settings_that_are_no_json_object(folder: Path, layout: Layout, text: str) -> None:
    (folder / SETTINGS[layout]).write_text(text)
    with pytest.raises(AdapterFormatError, match=r"can't be read as JSON|one JSON object"):
        read_mixture_folder(folder)


def test_missing_expert(folder: Path, layout: Layout) -> None:
    shutil.rmtree(folder / {"peft": "1", "xlora": "team"}[layout])
    with pytest.raises((AdapterFormatError, AdapterNotFoundError), match=r"(mix/1|expert 'team/materials').*"):
        read_mixture_folder(folder)


def test_experts_in_no_known_place(tmp_path: Path) -> None:
    folder = write_mixture(tmp_path / "mix", "peft", CONFIG)
    for number in range(3):
        shutil.rmtree(folder / str(number))
    with pytest.raises(AdapterNotFoundError, match=r"expert '0' .* neither a folder nor a hub id.*Put the expert into"):
        read_mixture_folder(folder)


@pytest.mark.parametrize("names", [["../protein"], ["a/../../b"], ["/etc"]])
def test_expert_outside_of_the_folder(names: list[str], tmp_path: Path) -> None:
    config = XLoraConfig()
    folder = write_mixture(tmp_path / "mix", "xlora", config)
    change_json(folder / "xlora_config.json", {"adapters": names})
    save_file({"last.weight": torch.zeros(1, HIDDEN), "last.bias": torch.zeros(1)}, folder / HEAD["xlora"])
    with pytest.raises(AdapterFormatError, match="would lie outside of it"):
        read_mixture_folder(folder)


@pytest.mark.parametrize("names", [["a", "a", "b"], ["a", "b:c", "d"], ["a", 1, "b"]])
def test_original_expert_names(names: list[Any], tmp_path: Path) -> None:
    folder = write_mixture(tmp_path / "mix", "xlora", CONFIG)
    change_json(folder / "xlora_config.json", {"adapters": names})
    with pytest.raises(AdapterFormatError, match=r"each named once|can't name an adapter"):
        read_mixture_folder(folder)


def test_peft_experts_without_numbers(tmp_path: Path) -> None:
    folder = write_mixture(tmp_path / "mix", "peft", CONFIG)
    change_json(folder / "adapter_config.json", {"adapters": {"b": "x/y", "a": "x/y", "c": "x/y"}})
    with pytest.raises(AdapterFormatError, match=r"named \['b', 'a', 'c'\].*Name them by number"):
        read_mixture_folder(folder)


@pytest.mark.parametrize("names", [None, ["a", "b"], ["a", "a", "b"], ["a", "b", "c:1"]])
def test_names_file_that_doesn_t_fit(names: list[str] | None, tmp_path: Path) -> None:
    folder = write_mixture(tmp_path / "mix", "peft", CONFIG)
    change_json(folder / "loraplex.json", {"expert_names": names})
    with pytest.raises(AdapterFormatError, match=r"loraplex\.json"):
        read_mixture_folder(folder)


def test_one_scaling_for_a_whole_sequence(tmp_path: Path) -> None:
    folder = write_mixture(tmp_path / "mix", "xlora", CONFIG)
    change_json(folder / "xlora_config.json", {"use_mean_pool": False})
    with pytest.raises(UnsupportedAdapterError, match="use_mean_pool is False"):
        read_mixture_folder(folder)


def test_folders_that_are_no_mixtures(tmp_path: Path) -> None:
    with pytest.raises(AdapterFormatError, match=r"does not exist\. A mixture is a folder with"):
        read_mixture_folder(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(AdapterFormatError, match="is a file"):
        read_mixture_folder(tmp_path / "file")
    with pytest.raises(AdapterFormatError, match=r"it holds \['file'\]"):
        read_mixture_folder(tmp_path)
    mixture = write_mixture(tmp_path / "mix", "peft", CONFIG)
    with pytest.raises(UnsupportedAdapterError, match=r"peft_type is 'LORA', so this is no mixture.*load_adapter"):
        read_mixture_folder(mixture / "0")
    other = write_mixture(tmp_path / "other", "xlora", CONFIG)
    shutil.copyfile(mixture / "adapter_config.json", other / "adapter_config.json")
    with pytest.raises(AdapterFormatError, match="holds two mixtures"):
        read_mixture_folder(other)


def test_check_head_for_heads_in_memory() -> None:
    state = head_state(CONFIG)
    sizes = {"hidden_size": HIDDEN, "num_experts": 3}
    check_head(state, CONFIG, **sizes)
    check_head(state, CONFIG, **sizes, num_layers=3)
    with pytest.raises(AdapterFormatError, match=r"my head doesn't match.*is \[9, 12\] instead of \[6, 12\]"):
        check_head(state, CONFIG, **sizes, num_layers=2, where="my head")
    with pytest.raises(AdapterFormatError, match=r"lacks 'layers.0.weight', 'layers.0.bias'"):
        check_head({name: state[name] for name in list(state)[2:]}, CONFIG, **sizes)
    with pytest.raises(AdapterFormatError, match="NaN"):
        check_head(state | {"layers.0.bias": torch.full((12,), float("nan"))}, CONFIG, **sizes)
