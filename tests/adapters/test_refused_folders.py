import math
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loraplex.adapters.peft.reader import read_adapter
from loraplex.errors import AdapterError, AdapterFormatError, UnsupportedAdapterError
from tests.adapters.folders import LAYER, lora_pair, two_modules, write_folder

Q_PROJ = "model.layers.0.self_attn.q_proj"
Q_A = f"{LAYER}.q_proj.lora_A.weight"
Q_B = f"{LAYER}.q_proj.lora_B.weight"


def assert_refused(folder: Path, error: type[AdapterError], *words: str) -> None:
    with pytest.raises(error) as caught:
        read_adapter(folder)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"peft_type": "LOHA"}, ["'LOHA'", "names an unsupported method", "Supported: 'LORA'"]),
        ({"peft_type": "XLORA"}, ["'XLORA'", "load_mixture"]),
        ({"peft_type": None}, ["peft_type None"]),
        ({"bias": "all"}, ["bias is 'all'"]),
        ({"bias": "lora_only"}, ["bias is 'lora_only'"]),
        ({"modules_to_save": ["lm_head"]}, ["modules_to_save", "['lm_head']"]),
        ({"lora_bias": True}, ["lora_bias"]),
        ({"trainable_token_indices": [1, 2]}, ["trainable_token_indices"]),
        ({"trainable_token_indices": {"embed_tokens": [1]}}, ["trainable_token_indices"]),
        ({"layer_replication": [[0, 2], [1, 3]]}, ["layer_replication"]),
        ({"megatron_config": {"hidden_size": 8}}, ["megatron_config"]),
        ({"use_qalora": True}, ["use_qalora"]),
        ({"use_bdlora": {"nblocks": 2}}, ["use_bdlora"]),
        ({"use_bdlora": {}}, ["use_bdlora"]),  # PEFT takes {} for "with the default options"
        ({"arrow_config": {"top_k": 2}}, ["arrow_config"]),
        ({"kasa_config": {}}, ["kasa_config"]),
        (
            {"init_lora_weights": "pissa"},
            ["init_lora_weights", "'pissa'", "changes the base model's weights"],
        ),
        ({"init_lora_weights": "pissa_niter_16"}, ["'pissa_niter_16'"]),
        ({"init_lora_weights": "olora"}, ["'olora'"]),
        ({"init_lora_weights": "OLoRA"}, ["'OLoRA'"]),
        ({"init_lora_weights": "corda"}, ["'corda'"]),
        ({"init_lora_weights": "loftq"}, ["'loftq'"]),
        ({"init_lora_weights": "lora_ga"}, ["'lora_ga'"]),
        ({"init_lora_weights": "new_init"}, ["'new_init'", "is unknown"]),
        ({"ensure_weight_tying": True, "target_modules": ["model.embed_tokens"]}, ["ensure_weight_tying"]),
        ({"ensure_weight_tying": True, "target_modules": ".*"}, ["ensure_weight_tying"]),
        ({"a_future_setting": 3}, ["unknown settings", "a_future_setting", "ignore_unknown"]),
        ({"enable_lora": [True, False, True]}, ["unknown settings", "enable_lora"]),
        ({"invocation_string": "<|start|>"}, ["unknown settings", "invocation_string"]),
    ],
)
def test_setting_that_cannot_be_honoured_is_refused_by_name(
    tmp_path: Path, settings: dict[str, Any], words: list[str]
) -> None:
    assert_refused(write_folder(tmp_path, settings), UnsupportedAdapterError, "adapter_config.json", *words)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"r": 0}, ["r is 0"]),
        ({"r": None}, ["r is None"]),
        ({"lora_alpha": math.nan}, ["the number NaN"]),
        ({"target_modules": 3}, ["target_modules is 3"]),
        ({"target_modules": "*"}, ["not a regular expression"]),
        ({"target_modules": "*", "ensure_weight_tying": True}, ["nothing to repeat"]),
        ({"rank_pattern": {"q_proj": "8"}}, ["rank_pattern"]),
        ({"rank_pattern": [8]}, ["rank_pattern"]),
        ({"layers_pattern": "layers"}, ["layers_to_transform is None"]),
        ({"use_dora": True, "alora_invocation_tokens": [1]}, ["can't be combined"]),
    ],
)
def test_setting_with_an_impossible_value_is_refused(
    tmp_path: Path, settings: dict[str, Any], words: list[str]
) -> None:
    assert_refused(write_folder(tmp_path, settings), AdapterFormatError, "adapter_config.json", *words)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "\xff"])
def test_configuration_that_is_no_json_object_is_refused(tmp_path: Path, content: str) -> None:
    (write_folder(tmp_path) / "adapter_config.json").write_bytes(content.encode("latin1"))
    assert_refused(tmp_path, AdapterFormatError, "adapter_config.json", "JSON")


def test_missing_folder_and_files_are_named_with_what_a_folder_needs(tmp_path: Path) -> None:
    needed = "a folder with adapter_config.json and adapter_model.safetensors"
    assert_refused(tmp_path / "nowhere", AdapterFormatError, "nowhere", "does not exist", needed)
    file = write_folder(tmp_path / "adapter") / "adapter_config.json"
    assert_refused(file, AdapterFormatError, "is a file", needed)
    file.unlink()
    assert_refused(file.parent, AdapterFormatError, "has no adapter_config.json", needed)
    shutil.copytree(write_folder(tmp_path / "other"), file.parent, dirs_exist_ok=True)
    (file.parent / "adapter_model.safetensors").unlink()
    assert_refused(file.parent, AdapterFormatError, "has no adapter_model.safetensors", needed)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_pickle_file_is_refused_with_the_way_to_convert_it(tmp_path: Path, name: str) -> None:
    folder = write_folder(tmp_path)
    (folder / "adapter_model.safetensors").rename(folder / name)
    assert_refused(folder, UnsupportedAdapterError, name, "loraplex convert")


def _truncated(raw: bytes) -> bytes:
    return raw[:-5]


@pytest.mark.parametrize(
    "damage",
    [
        _truncated,
        lambda raw: raw[:30],
        lambda raw: b"",
        lambda raw: raw + b"more",
        lambda raw: struct.pack("<Q", 2**60) + raw[8:],
        lambda raw: struct.pack("<Q", 4) + b"null" + raw[12:],
    ],
)
def test_damaged_weights_file_is_refused(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    file = write_folder(tmp_path) / "adapter_model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    assert_refused(tmp_path, AdapterFormatError, "adapter_model.safetensors", "not a whole safetensors file")


def test_git_lfs_pointer_is_refused_with_the_way_to_fetch_the_file(tmp_path: Path) -> None:
    file = write_folder(tmp_path) / "adapter_model.safetensors"
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    assert_refused(tmp_path, AdapterFormatError, "adapter_model.safetensors", "Git LFS pointer", "git lfs pull")


@pytest.mark.parametrize(
    ("inner", "named"),
    [
        (["checkpoint-1000", "checkpoint-500"], "checkpoint-1000"),
        (["default"], "default"),
        (["protein"], "protein"),
    ],
)
def test_folder_with_adapters_below_it_is_refused_with_their_names(
    tmp_path: Path, inner: list[str], named: str
) -> None:
    for name in inner:
        write_folder(tmp_path / name)
    (tmp_path / "logs").mkdir()
    words = [repr(name) for name in inner]
    assert_refused(tmp_path, AdapterFormatError, *words, f"Load one of them: {str(tmp_path / named)!r}")
    shutil.copy(tmp_path / named / "adapter_config.json", tmp_path)
    assert_refused(tmp_path, AdapterFormatError, "has no adapter_model.safetensors", repr(str(tmp_path / named)))


def test_mixture_of_the_original_layout_is_refused_with_the_call_that_loads_it(tmp_path: Path) -> None:
    write_folder(tmp_path / "adapter_1")
    (tmp_path / "xlora_config.json").write_text("{}")
    assert_refused(tmp_path, UnsupportedAdapterError, "mixture (X-LoRA)", "load_mixture")


def test_weights_file_that_is_a_folder_is_refused(tmp_path: Path) -> None:
    file = write_folder(tmp_path) / "adapter_model.safetensors"
    file.unlink()
    file.mkdir()
    assert_refused(tmp_path, AdapterFormatError, "has no adapter_model.safetensors")


@pytest.mark.parametrize(
    ("value", "words"), [(math.nan, ["1 NaN and 0 infinite"]), (-math.inf, ["0 NaN and 1 infinite"])]
)
@pytest.mark.parametrize("name", [Q_A, Q_B])
def test_weights_that_are_no_numbers_are_refused_by_tensor_and_count(
    tmp_path: Path, name: str, value: float, words: list[str]
) -> None:
    tensors = two_modules()
    tensors[name][2, 3] = value
    folder = write_folder(tmp_path, tensors=tensors)
    assert_refused(folder, AdapterFormatError, repr(name), f"of {tensors[name].numel()}", *words)
    assert len(read_adapter(folder, check_finite=False).layers) == 2


def without(name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in two_modules().items() if key != name}


def replaced(name: str, tensor: Tensor) -> dict[str, Tensor]:
    return two_modules() | {name: tensor}


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (without(Q_B), [Q_PROJ, "no lora_B.weight"]),
        (without(Q_A), [Q_PROJ, "no lora_A.weight"]),
        (replaced(Q_B, torch.randn(24, 5)), ["rank 4 in its A", "5 in its B", "4 in the configuration"]),
        (lora_pair(f"{LAYER}.q_proj", rank=8), ["rank 8 in its A", "4 in the configuration (r=4"]),
        (replaced(Q_A, torch.randn(4, 16, 1, 1)), [repr(Q_A), "[4, 16, 1, 1]"]),
        (replaced(Q_A, torch.randn(64)), [repr(Q_A), "[64]"]),
        (replaced(Q_A, torch.randn(4, 0)), [repr(Q_A), "[4, 0]"]),
        (replaced("model.layers.0.q_proj.lora_A.weight", torch.randn(4, 16)), ["unknown names"]),
        (replaced(f"{LAYER}.q_proj.lora_A.default.weight", torch.randn(4, 16)), ["both", "weights of two adapters"]),
        (replaced(f"{LAYER}.q_proj.lora_B.bias", torch.randn(24)), ["lora_bias is False", "lora_B.bias"]),
        (replaced(f"{LAYER}.q_proj.lora_embedding_A", torch.randn(4, 16)), ["linear and of an embedding"]),
        (
            replaced(f"{LAYER}.q_proj.lora_magnitude_vector", torch.randn(24)),
            ["use_dora is False", "is there"],
        ),
        (replaced(f"{LAYER}.q_proj.base_layer.weight", torch.randn(7, 16)), ["base_layer.weight", "[7, 16]"]),
        (replaced(f"{LAYER}.k_proj.base_layer.weight", torch.randn(24, 16)), ["k_proj", "no lora_A.weight"]),
        ({}, ["no LoRA tensors"]),
    ],
)
def test_tensors_that_do_not_make_up_an_adapter_are_refused(
    tmp_path: Path, tensors: dict[str, Tensor], words: list[str]
) -> None:
    assert_refused(write_folder(tmp_path, tensors=tensors), AdapterFormatError, *words)


def test_rank_is_compared_with_the_rank_pattern(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, {"rank_pattern": {"q_proj": 16}})
    assert_refused(folder, AdapterFormatError, Q_PROJ, "16 in the configuration")


def test_dora_without_or_with_a_wrong_magnitude_is_refused(tmp_path: Path) -> None:
    name = f"{LAYER}.q_proj.lora_magnitude_vector"
    tensors = lora_pair(f"{LAYER}.q_proj")
    assert_refused(write_folder(tmp_path, {"use_dora": True}, tensors), AdapterFormatError, "is missing")
    tensors[name] = torch.randn(16)
    assert_refused(write_folder(tmp_path, {"use_dora": True}, tensors), AdapterFormatError, repr(name), "[24]")
    tensors |= {name: torch.randn(24), f"{name}.weight": torch.randn(24)}
    assert_refused(write_folder(tmp_path, {"use_dora": True}, tensors), AdapterFormatError, "both")


@pytest.mark.parametrize("name", ["base_model.model.model.embed_tokens.weight", f"{LAYER}.q_proj.bias"])
def test_weights_of_the_base_model_are_refused(tmp_path: Path, name: str) -> None:
    folder = write_folder(tmp_path, tensors=replaced(name, torch.randn(9)))
    assert_refused(folder, UnsupportedAdapterError, repr(name), "weights of the base model")


def test_alora_on_an_embedding_is_refused(tmp_path: Path) -> None:
    module = "base_model.model.embed"
    tensors = {
        f"{module}.lora_embedding_A": torch.randn(4, 9),
        f"{module}.lora_embedding_B": torch.randn(8, 4),
    }
    folder = write_folder(tmp_path, {"alora_invocation_tokens": [5, 6]}, tensors)
    assert_refused(folder, UnsupportedAdapterError, "'embed'", "aLoRA")


@pytest.mark.parametrize("dtype", [torch.int32, torch.float8_e4m3fn])
def test_weights_in_another_dtype_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = write_folder(tmp_path, tensors=replaced(Q_A, torch.ones(4, 16).to(dtype)))
    assert_refused(folder, UnsupportedAdapterError, repr(Q_A), "Supported: F16, BF16, F32, F64")


def test_message_names_five_offenders_and_counts_the_rest(tmp_path: Path) -> None:
    tensors = two_modules() | {f"tensor_{index}": torch.ones(1) for index in range(8)}
    with pytest.raises(AdapterFormatError) as caught:
        read_adapter(write_folder(tmp_path, tensors=tensors))
    assert re.findall(r"tensor_\d", str(caught.value)) == [f"tensor_{index}" for index in range(5)]
    assert "(8 in all)" in str(caught.value)
