"""Mixtures written and read again, in both layouts."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraplex.adapters.peft.reader import read_adapter
from loraplex.adapters.weights import Adapter
from loraplex.errors import AdapterExistsError, AdapterFormatError, ConfigError, OutputError, UnsupportedAdapterError
from loraplex.xlora.config import XLoraConfig
from loraplex.xlora.formats.folders import read_mixture_folder
from loraplex.xlora.formats.mixture_folder import Layout, MixtureFolder
from tests.xlora.mixtures import HIDDEN, LAYERS, NAMES, change_json, expert, experts, head_state, write_mixture

CONFIGS = {
    "defaults": XLoraConfig(),
    "layerwise": XLoraConfig(layerwise_scalings=True, top_k_lora=2, enable_softmax_topk=True, enable_softmax=False),
    "deep": XLoraConfig(xlora_depth=4, xlora_size=12, layerwise_scalings=True, softmax_temperature=0.5),
    "deep without dropout": XLoraConfig(xlora_depth=3, xlora_size=12, xlora_dropout_p=0.0, scaling_pass_value=0.5),
    "odd numbers": XLoraConfig(global_scaling_weight=-2.5, use_trainable_adapters=True, xlora_dropout_p=0.7),
}
ORIGINAL_CONFIGS = {
    "no bias": XLoraConfig(xlora_depth=3, xlora_size=12, use_bias=False),
    "no relu": XLoraConfig(xlora_depth=3, xlora_size=12, enable_relu_and_dropout=False),
}


def check_same(mixture: MixtureFolder, config: XLoraConfig) -> None:
    assert mixture.config == config
    assert mixture.hidden_size == HIDDEN
    assert mixture.base_model_name == "tiny/llama"
    assert mixture.num_layers == (LAYERS if config.layerwise_scalings else None)
    assert tuple(mixture.experts) == mixture.expert_names == NAMES
    expected = head_state(config)
    assert list(mixture.head) == list(expected)
    assert all(torch.equal(mixture.head[name], tensor) for name, tensor in expected.items())
    for folder, written in zip(mixture.experts.values(), experts().values(), strict=True):
        check_same_adapter(read_adapter(folder), written)


def check_same_adapter(adapter: Adapter, written: Adapter) -> None:
    assert adapter.config == written.config
    assert adapter.layers.keys() == written.layers.keys()
    for path, weights in written.layers.items():
        for part in ("lora_a", "lora_b", "magnitude"):
            tensor = getattr(weights, part)
            assert tensor is None or torch.equal(getattr(adapter.layers[path], part), tensor)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("layout", ["peft", "xlora"])
def test_what_is_written_is_read(layout: Layout, name: str, tmp_path: Path) -> None:
    mixture = read_mixture_folder(write_mixture(tmp_path / "mix", layout, CONFIGS[name]))
    assert mixture.layout == layout
    check_same(mixture, CONFIGS[name])
    assert [path.name for path in tmp_path.iterdir()] == ["mix"]  # nothing temporary is left


@pytest.mark.parametrize("name", ORIGINAL_CONFIGS)
def test_heads_that_only_the_original_has(name: str, tmp_path: Path) -> None:
    config = ORIGINAL_CONFIGS[name]
    check_same(read_mixture_folder(write_mixture(tmp_path / "mix", "xlora", config)), config)
    with pytest.raises(UnsupportedAdapterError, match=r"Write layout='xlora'"):
        write_mixture(tmp_path / "peft", "peft", config)
    assert [path.name for path in tmp_path.iterdir()] == ["mix"]


@pytest.mark.parametrize("layout", ["peft", "xlora"])
def test_pass_value_none_is_written_as_its_number(layout: Layout, tmp_path: Path) -> None:
    mixture = read_mixture_folder(write_mixture(tmp_path / "mix", layout, XLoraConfig(scaling_pass_value=None)))
    assert mixture.config.scaling_pass_value == 1 / 3


def test_a_folder_that_was_moved_is_read(tmp_path: Path) -> None:
    write_mixture(tmp_path / "mix", "peft", XLoraConfig()).rename(tmp_path / "moved")
    mixture = read_mixture_folder(tmp_path / "moved")
    assert all(Path(folder).is_relative_to(tmp_path / "moved") for folder in mixture.experts.values())


@pytest.mark.parametrize("layout", ["peft", "xlora"])
def test_more_than_ten_experts_keep_their_order(layout: Layout, tmp_path: Path) -> None:
    config = XLoraConfig()
    named = {f"e{number}": expert(number % 4) for number in range(12)}
    state = head_state(config, num_layers=2, num_experts=12)
    mixture = read_mixture_folder(
        write_mixture(tmp_path, layout, config, experts=named, head_state=state, overwrite=True)
    )
    assert list(mixture.experts) == list(named)
    for folder, written in zip(mixture.experts.values(), named.values(), strict=True):
        check_same_adapter(read_adapter(folder), written)
    if layout == "peft":
        adapters = json.loads((tmp_path / "adapter_config.json").read_text())["adapters"]
        assert list(adapters) == [str(number) for number in range(12)]  # PEFT goes by this order


def test_original_layout_has_the_package_s_names_and_settings(tmp_path: Path) -> None:
    config = XLoraConfig(xlora_depth=3, xlora_size=12, xlora_dropout_p=0.0)
    folder = write_mixture(tmp_path / "mix", "xlora", config)
    tensors = load_file(folder / "xlora_classifier.safetensors")
    # inner = [Linear, ReLU, Dropout, Linear, ReLU, Dropout] even where the dropout is 0
    assert sorted(tensors) == sorted(
        f"{layer}.{part}" for layer in ("inner.0", "inner.3", "last") for part in ("weight", "bias")
    )
    settings = json.loads((folder / "xlora_config.json").read_text())
    assert list(settings) == [
        *("hidden_size", "base_model_id", "adapters", "enable_softmax", "enable_softmax_topk", "layerwise_scalings"),
        *("xlora_depth", "xlora_size", "enable_relu_and_dropout", "use_bias", "xlora_dropout_p"),
        *("use_trainable_adapters", "softmax_temperature", "top_k_lora", "scaling_pass_value"),
        "global_scaling_weight",
    ]
    assert settings["adapters"] == list(NAMES)
    assert (folder / "team" / "materials" / "adapter_model.safetensors").is_file()


def test_experts_given_by_folder_are_copied_unchanged(tmp_path: Path) -> None:
    first = read_mixture_folder(write_mixture(tmp_path / "first", "xlora", XLoraConfig()))
    write_mixture(tmp_path / "second", "peft", XLoraConfig(), experts=first.experts)
    for number, folder in enumerate(first.experts.values()):
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            assert (tmp_path / "second" / str(number) / file).read_bytes() == (Path(folder) / file).read_bytes()
    check_same(read_mixture_folder(tmp_path / "second"), XLoraConfig())


def test_a_mixture_is_overwritten_only_on_request_and_by_any_layout(tmp_path: Path) -> None:
    folder = write_mixture(tmp_path / "mix", "xlora", XLoraConfig())
    with pytest.raises(AdapterExistsError, match="overwrite=True"):
        write_mixture(folder, "peft", XLoraConfig())
    write_mixture(folder, "peft", XLoraConfig(softmax_temperature=2.0), overwrite=True)
    mixture = read_mixture_folder(folder)
    assert (mixture.layout, mixture.config.softmax_temperature) == ("peft", 2.0)
    assert not (folder / "xlora_config.json").exists()
    # its own experts, in place
    write_mixture(folder, "xlora", XLoraConfig(), experts=mixture.experts, overwrite=True)
    check_same(read_mixture_folder(folder), XLoraConfig())


@pytest.mark.parametrize("foreign", ["notes.txt", "0/notes.txt", "other/adapter_config.json"])
def test_a_folder_with_other_files_is_not_overwritten(foreign: str, tmp_path: Path) -> None:
    folder = write_mixture(tmp_path / "mix", "peft", XLoraConfig())
    (folder / foreign).parent.mkdir(exist_ok=True)
    (folder / foreign).write_text("{}")
    with pytest.raises(AdapterExistsError, match=f"it holds '{foreign}'"):
        write_mixture(folder, "peft", XLoraConfig(), overwrite=True)
    assert read_mixture_folder(folder).num_experts == 3


def test_a_folder_of_adapters_is_not_overwritten_by_a_mixture(tmp_path: Path) -> None:
    folder = write_mixture(tmp_path / "adapters", "peft", XLoraConfig())
    (folder / "adapter_config.json").unlink()
    with pytest.raises(AdapterExistsError, match="not a whole mixture"):
        write_mixture(folder, "peft", XLoraConfig(), overwrite=True)
    assert (folder / "0").is_dir()


def test_a_failed_write_leaves_the_old_mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_mixture(tmp_path / "mix", "peft", XLoraConfig())

    def fail(*arguments: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("loraplex.xlora.formats.write_folder.write_or_copy", fail)
    with pytest.raises(OutputError, match="disk full"):
        write_mixture(folder, "xlora", XLoraConfig(), overwrite=True)
    check_same(read_mixture_folder(folder), XLoraConfig())
    assert [path.name for path in tmp_path.iterdir()] == ["mix"]


@pytest.mark.parametrize("name", ["..", "a/../b", "/a", "a//b", "README.md", "protein/inner"])
def test_expert_names_that_are_no_folder_inside_are_refused(name: str, tmp_path: Path) -> None:
    named = {"protein": expert(0), name: expert(1), "last": expert(2)}
    with pytest.raises(ConfigError, match="would be written"):
        write_mixture(tmp_path / "mix", "xlora", XLoraConfig(), experts=named)
    assert not (tmp_path / "mix").exists()


def test_a_head_for_other_layers_is_not_written(tmp_path: Path) -> None:
    config = XLoraConfig(layerwise_scalings=True)
    with pytest.raises(AdapterFormatError, match=r"layers.0.weight' is \[12, 16\] instead of \[9, 16\]"):
        write_mixture(tmp_path / "mix", "peft", config, head_state=head_state(config, num_layers=4))
    broken = head_state(XLoraConfig())
    broken["layers.0.bias"][1] = float("nan")
    with pytest.raises(AdapterFormatError, match="1 NaN"):
        write_mixture(tmp_path / "mix", "peft", XLoraConfig(), head_state=broken)
    with pytest.raises(ConfigError, match="layout is 'PEFT'"):
        write_mixture(tmp_path / "mix", "PEFT", XLoraConfig())
    assert not (tmp_path / "mix").exists()


def test_an_expert_called_default_is_found_on_top_as_the_original_saves_it(tmp_path: Path) -> None:
    named = {"default": expert(0), "b": expert(1, ("q_proj", "o_proj")), "c": expert(2)}
    folder = write_mixture(tmp_path / "mix", "xlora", XLoraConfig(), experts=named)
    for file in (folder / "default").iterdir():
        file.rename(folder / file.name)
    mixture = read_mixture_folder(folder)
    assert mixture.experts["default"] == folder
    check_same_adapter(read_adapter(mixture.experts["default"]), named["default"])


def test_settings_of_early_original_versions(tmp_path: Path) -> None:
    folder = write_mixture(tmp_path / "mix", "xlora", XLoraConfig())
    file = folder / "xlora_config.json"
    adapters = {name: f"somewhere/{name}" for name in NAMES}
    change_json(file, {"adapters": adapters, "stop_token_id": 2}, drop=("scaling_pass_value",))
    mixture = read_mixture_folder(folder)
    assert mixture.config.scaling_pass_value is None  # they used 1 / experts, and didn't save it
    assert tuple(mixture.experts) == NAMES


def test_peft_layout_without_names_numbers_the_experts(tmp_path: Path) -> None:
    folder = write_mixture(tmp_path / "mix", "peft", XLoraConfig())
    (folder / "loraplex.json").unlink()
    assert list(read_mixture_folder(folder).experts) == ["0", "1", "2"]


def test_experts_outside_of_a_peft_folder(tmp_path: Path) -> None:
    folder = write_mixture(tmp_path / "mix", "peft", XLoraConfig())
    for number in range(3):
        (folder / str(number)).rename(tmp_path / f"expert{number}")
    places = {"0": str(tmp_path / "expert0"), "1": str(tmp_path / "expert1"), "2": "owner/expert2"}
    change_json(folder / "adapter_config.json", {"adapters": places})
    expected = {NAMES[0]: tmp_path / "expert0", NAMES[1]: tmp_path / "expert1", NAMES[2]: "owner/expert2"}
    assert dict(read_mixture_folder(folder).experts) == expected


def test_half_precision_heads_keep_their_dtype(tmp_path: Path) -> None:
    state = {name: tensor.bfloat16() for name, tensor in head_state(XLoraConfig()).items()}
    folder = write_mixture(tmp_path / "mix", "peft", XLoraConfig(), head_state=state)
    head = read_mixture_folder(folder).head
    assert all(torch.equal(head[name], tensor) for name, tensor in state.items())
    save_file(head, tmp_path / "head.safetensors")  # contiguous and without aliases


@pytest.mark.parametrize("layout", ["peft", "xlora"])
def test_experts_from_elsewhere_need_not_be_there(layout: Layout, tmp_path: Path) -> None:
    folder = write_mixture(tmp_path / "mix", layout, XLoraConfig())
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
    mixture = read_mixture_folder(folder, find_experts=False)
    assert (mixture.expert_names, mixture.experts, mixture.num_experts) == (NAMES, {}, 3)
