"""Adapters in other formats, converted; each result is compared with PEFT or with the weights merged in float64."""

import copy
import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

from loraplex import MultiLoraModel
from loraplex.adapters.peft.reader import read_adapter
from loraplex.errors import (
    AdapterExistsError,
    AdapterFormatError,
    BaseModelMismatchError,
    ConfigError,
    OutputError,
    UnsupportedAdapterError,
)
from loraplex.models.checkpoints.gguf_names import gguf_names
from loraplex.models.convert.conversion import convert_to_gguf, convert_to_peft
from tests.adapters.folders import as_pickle
from tests.adapters.mlx_folders import write_mlx
from tests.parity.oracle import assert_close
from tests.tiny_models import random_peft_adapter, tiny_model

IDS = torch.tensor([[5, 9, 17, 33, 60, 12, 7]])
TARGETS = ("q_proj", "k_proj", "v_proj", "down_proj")


def our_logits(base: PreTrainedModel, folder: Path) -> Tensor:
    with MultiLoraModel(copy.deepcopy(base), fast_decode=False) as model:
        model.load_adapter("a", folder)
        return model(IDS, adapters=["a"]).logits[0]


def peft_logits(base: PreTrainedModel, folder: Path) -> Tensor:
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits[0]


@torch.no_grad()
def merged_logits(base: PreTrainedModel, updates: dict[str, Tensor]) -> Tensor:
    """What the model gives with each update added to a module's weight."""
    merged = copy.deepcopy(base).double()
    for path, update in updates.items():
        merged.get_submodule(path).weight += update.double()
    return merged(input_ids=IDS).logits[0].float()


# .bin


def test_pickled_weights_are_peft_s(tmp_path: Path) -> None:
    base = tiny_model("llama")
    folder = as_pickle(random_peft_adapter(base, tmp_path / "bin", targets=TARGETS))
    with pytest.raises(UnsupportedAdapterError, match=r"pickle file.*Convert it to safetensors: loraplex convert"):
        read_adapter(folder)
    convert_to_peft(folder, tmp_path / "out")
    assert_close(our_logits(base, tmp_path / "out"), peft_logits(base, folder), ".bin")  # PEFT reads .bin
    assert (folder / "adapter_model.bin").exists()


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('code of the file was run')",))


def write_harmful(file: Path) -> None:
    torch.save({"base_model.model.x": Harmful()}, file)


def write_plain_pickle(file: Path) -> None:
    file.write_bytes(pickle.dumps({"x": Harmful()}))


def write_legacy(file: Path) -> None:
    torch.save({"x": torch.ones(2)}, file, _use_new_zipfile_serialization=False)


def write_compressed(file: Path) -> None:
    torch.save({"x": torch.zeros(1 << 16)}, file)
    with zipfile.ZipFile(file) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)


def write_expanded(file: Path) -> None:
    torch.save({"base_model.model.x.lora_A.weight": torch.zeros(1).expand(1 << 20, 1 << 12)}, file)


def write_list(file: Path) -> None:
    torch.save([torch.ones(1)], file)


def write_numbers(file: Path) -> None:
    torch.save({"x": 3}, file)


def write_integers(file: Path) -> None:
    torch.save({"x": torch.ones(2, dtype=torch.int64)}, file)


def write_half(file: Path) -> None:
    torch.save({"x": torch.ones(2000)}, file)
    file.write_bytes(file.read_bytes()[:4000])


@pytest.mark.parametrize(
    ("write", "error", "message"),
    [
        (write_harmful, UnsupportedAdapterError, "more than tensors"),
        (write_plain_pickle, UnsupportedAdapterError, "no archive"),
        (write_legacy, UnsupportedAdapterError, r"since torch 1\.6"),
        (write_compressed, UnsupportedAdapterError, "compressed"),
        (write_expanded, AdapterFormatError, "larger than the file"),
        (write_list, AdapterFormatError, "a list"),
        (write_numbers, AdapterFormatError, "no tensors"),
        (write_integers, UnsupportedAdapterError, "floating point"),
        (write_half, UnsupportedAdapterError, "no archive"),
    ],
)
def test_pickle_that_is_no_state_dict_is_refused_and_not_run(
    write: Any, error: type[Exception], message: str, tmp_path: Path
) -> None:
    folder = as_pickle(random_peft_adapter(tiny_model("llama"), tmp_path / "bin", targets=("q_proj",)))
    write(folder / "adapter_model.bin")
    with pytest.raises(error, match=message):
        convert_to_peft(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# MLX


def test_mlx_adapter_computes_what_mlx_computes(tmp_path: Path) -> None:
    base = tiny_model("llama")
    folder = write_mlx(tmp_path / "mlx", base)
    convert_to_peft(folder, tmp_path / "out")
    tensors = load_file(folder / "adapters.safetensors")
    # mlx_lm/tuner/lora.py, `fuse`: weight + scale * lora_b.T @ lora_a.T
    updates = {
        name.removesuffix(".lora_a"): 20.0 * tensors[name.replace("lora_a", "lora_b")].double().T @ lora_a.double().T
        for name, lora_a in tensors.items()
        if name.endswith("lora_a")
    }
    expected = merged_logits(base, updates)
    assert (expected - merged_logits(base, {})).abs().max() > 0.1
    assert_close(our_logits(base, tmp_path / "out"), expected, "mlx")
    assert_close(peft_logits(base, tmp_path / "out"), expected, "PEFT")
    assert read_adapter(tmp_path / "out").config.base_model_name_or_path == "mlx-community/tiny"


def test_mlx_dora_computes_what_mlx_computes(tmp_path: Path) -> None:
    base = tiny_model("llama")
    folder = write_mlx(tmp_path / "mlx", base, dora=True)
    convert_to_peft(folder, tmp_path / "out")
    tensors = load_file(folder / "adapters.safetensors")
    updates = {}
    for name, lora_a in tensors.items():
        if name.endswith("lora_a"):
            path = name.removesuffix(".lora_a")
            weight = base.get_submodule(path).weight.detach().double()
            adapted = weight + 20.0 * tensors[f"{path}.lora_b"].double().T @ lora_a.double().T
            # mlx_lm/tuner/dora.py, `fuse`: m / ||adapted|| * adapted, by row
            updates[path] = (tensors[f"{path}.m"].double() / adapted.norm(dim=1))[:, None] * adapted - weight
    assert_close(our_logits(base, tmp_path / "out"), merged_logits(base, updates), "mlx dora")


def test_mlx_folder_given_to_load_adapter_says_how_to_convert(tmp_path: Path) -> None:
    base = tiny_model("llama")
    folder = write_mlx(tmp_path / "mlx", base)
    with MultiLoraModel(base) as model, pytest.raises(UnsupportedAdapterError, match=r"MLX.*loraplex convert"):
        model.load_adapter("a", folder)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"fine_tune_type": "full"}, UnsupportedAdapterError, "'full'"),
        ({"lora_parameters": None}, AdapterFormatError, "lora_parameters is None"),
        ({"lora_parameters": {"rank": 4}}, AdapterFormatError, "scale"),
        ({"lora_parameters": {"rank": 8, "scale": 2.0}}, AdapterFormatError, "rank is 8"),
        (
            {"lora_parameters": {"rank": 4, "scale": 10.0, "alpha": 16.0}},
            UnsupportedAdapterError,
            r"--scale 10 or 40",
        ),
    ],
)
def test_mlx_settings_that_do_not_tell_are_refused(
    changes: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    folder = write_mlx(tmp_path / "mlx", tiny_model("llama"))
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | changes))
    with pytest.raises(error, match=message):
        convert_to_peft(folder, tmp_path / "out")


def test_scale_of_an_early_mlx_adapter_can_be_given(tmp_path: Path) -> None:
    folder = write_mlx(tmp_path / "mlx", tiny_model("llama"))
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["lora_parameters"] = {"rank": 4, "scale": 10.0, "alpha": 16.0}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    adapter = convert_to_peft(folder, tmp_path / "out", scale=40.0)
    assert {weights.scaling for weights in adapter.layers.values()} == {40.0}


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("model.embed_tokens.lora_a", (128, 4), "shares"),
        ("model.layers.0.mlp.experts.lora_a", (2, 4, 8), "has \\['lora_a'\\]"),
        ("model.norm.weight", (64,), "no LoRA layer"),
        ("model.layers.1.self_attn.q_proj.lora_a_scales", (4, 4), "quantized"),
    ],
)
def test_mlx_tensors_that_peft_has_no_layer_for_are_refused(
    name: str, shape: tuple[int, ...], message: str, tmp_path: Path
) -> None:
    folder = write_mlx(tmp_path / "mlx", tiny_model("llama"))
    tensors = load_file(folder / "adapters.safetensors") | {name: torch.ones(shape)}
    save_file(tensors, folder / "adapters.safetensors")
    with pytest.raises((UnsupportedAdapterError, AdapterFormatError), match=message):
        convert_to_peft(folder, tmp_path / "out")


# GGUF


def saved(base: PreTrainedModel, folder: Path) -> Path:
    """A base model's config alone."""
    base.config.save_pretrained(folder)
    return folder


def llama_cpp_order(rows: np.ndarray[Any, Any], num_heads: int) -> np.ndarray[Any, Any]:
    """`LlamaModel.permute` of llama.cpp's converter."""
    shape = rows.shape
    return rows.reshape(num_heads, 2, shape[0] // num_heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


GGUF_NAMES = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "down_proj": "ffn_down"}


def write_llama_cpp_adapter(file: Path, folder: Path, alpha: float, kind: type = np.float32) -> Path:
    """What llama.cpp's convert_lora_to_gguf.py writes for a PEFT adapter of a Llama with 4 heads and 2 KV heads."""
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        _, _, _, _, block, _, module, part, _ = name.split(".")
        values = tensor.numpy()
        if part == "lora_B" and module in ("q_proj", "k_proj"):
            values = llama_cpp_order(values, {"q_proj": 4, "k_proj": 2}[module])
        writer.add_tensor(f"blk.{block}.{GGUF_NAMES[module]}.weight.{part.lower()}", values.astype(kind).copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_gguf_adapter_of_llama_cpp_is_peft_s(tmp_path: Path) -> None:
    base = tiny_model("llama")
    folder = random_peft_adapter(base, tmp_path / "peft", targets=TARGETS)
    file = write_llama_cpp_adapter(tmp_path / "a.gguf", folder, alpha=8)
    with pytest.raises(ConfigError, match="--base"):
        convert_to_peft(file, tmp_path / "out")
    convert_to_peft(file, tmp_path / "out", base=saved(base, tmp_path / "base"))
    assert_close(our_logits(base, tmp_path / "out"), peft_logits(base, folder), "gguf")
    assert_close(peft_logits(base, tmp_path / "out"), peft_logits(base, folder), "PEFT")
    with pytest.raises(UnsupportedAdapterError, match=r"GGUF file.*loraplex convert"):
        read_adapter(file)


def test_row_order_matters_for_the_comparison(tmp_path: Path) -> None:
    rows = np.arange(64).reshape(64, 1)
    assert not np.array_equal(llama_cpp_order(rows, 4), rows)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"])
def test_order_of_rows_is_that_of_transformers_reader(name: str) -> None:
    base = tiny_model(name)
    names = gguf_names(base)
    kind = TENSOR_PROCESSORS.get(names.architecture, TensorProcessor)
    processor = kind(config=base.config.to_dict())
    assert len(names.by_path) > 8
    for path, in_file in names.by_path.items():
        rows = torch.randn(base.get_submodule(path).out_features, 3)
        ordered = processor.process(weights=rows.numpy(), name=f"{in_file}.weight").weights
        assert names.from_file(path, rows).equal(torch.from_numpy(np.ascontiguousarray(ordered)))
        assert names.from_file(path, names.to_file(path, rows)).equal(rows)


def test_gguf_alpha_of_zero_is_a_scale_of_one_and_half_precision_is_read(tmp_path: Path) -> None:
    base = tiny_model("llama")
    folder = random_peft_adapter(base, tmp_path / "peft", targets=("v_proj",), r=4, lora_alpha=4)
    file = write_llama_cpp_adapter(tmp_path / "a.gguf", folder, alpha=0, kind=np.float16)
    adapter = convert_to_peft(file, tmp_path / "out", base=saved(base, tmp_path / "base"))
    assert {weights.scaling for weights in adapter.layers.values()} == {1.0}
    expected = load_file(folder / "adapter_model.safetensors")
    for name, tensor in load_file(tmp_path / "out" / "adapter_model.safetensors").items():
        assert tensor.equal(expected[name].half().float())


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"])
@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"rank_pattern": {"o_proj": 2}, "alpha_pattern": {"o_proj": 3}}], ids=str
)
def test_what_is_written_as_gguf_is_read_again(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    base = tiny_model(name)
    targets = ("qkv_proj", "o_proj", "gate_up_proj") if name == "phi3" else (*TARGETS, "o_proj")
    folder = random_peft_adapter(base, tmp_path / "peft", targets=targets, options=options)
    model_folder = saved(base, tmp_path / "base")
    convert_to_gguf(folder, tmp_path / "a.gguf", base=model_folder)
    convert_to_peft(tmp_path / "a.gguf", tmp_path / "out", base=model_folder)
    assert_close(our_logits(base, tmp_path / "out"), peft_logits(base, folder), name)


def test_written_gguf_is_what_llama_cpp_s_converter_writes(tmp_path: Path) -> None:
    base = tiny_model("llama")
    folder = random_peft_adapter(base, tmp_path / "peft", targets=TARGETS)
    theirs = gguf.GGUFReader(write_llama_cpp_adapter(tmp_path / "theirs.gguf", folder, alpha=8))
    convert_to_gguf(folder, tmp_path / "ours.gguf", base=saved(base, tmp_path / "base"))
    ours = gguf.GGUFReader(tmp_path / "ours.gguf")
    assert {tensor.name for tensor in ours.tensors} == {tensor.name for tensor in theirs.tensors}
    expected = {tensor.name: tensor.data for tensor in theirs.tensors}
    assert all(np.array_equal(tensor.data, expected[tensor.name]) for tensor in ours.tensors)
    for key in ("general.architecture", "general.type", "adapter.type", "adapter.lora.alpha"):
        assert ours.get_field(key).contents() == theirs.get_field(key).contents()


def test_invocation_tokens_go_into_gguf_and_back(tmp_path: Path) -> None:
    base = tiny_model("llama")
    options = {"alora_invocation_tokens": [5, 6]}
    folder = random_peft_adapter(base, tmp_path / "peft", targets=("q_proj",), options=options)
    model_folder = saved(base, tmp_path / "base")
    convert_to_gguf(folder, tmp_path / "a.gguf", base=model_folder)
    convert_to_peft(tmp_path / "a.gguf", tmp_path / "out", base=model_folder)
    assert read_adapter(tmp_path / "out").config.alora_invocation_tokens == (5, 6)
    field = gguf.GGUFReader(tmp_path / "a.gguf").get_field("adapter.alora.invocation_tokens")
    assert field.types[-1] == gguf.GGUFValueType.UINT32  # the only one that llama.cpp takes


@pytest.mark.parametrize(
    ("options", "targets", "message"),
    [({"use_dora": True}, ("q_proj",), "DoRA"), ({}, ("embed_tokens",), "embed_tokens")],
)
def test_what_llama_cpp_has_no_place_for_is_not_written(
    options: dict[str, Any], targets: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    base = tiny_model("llama")
    folder = random_peft_adapter(base, tmp_path / "peft", targets=targets, options=options)
    with pytest.raises(UnsupportedAdapterError, match=message):
        convert_to_gguf(folder, tmp_path / "a.gguf", base=saved(base, tmp_path / "base"))
    assert not (tmp_path / "a.gguf").exists()


def test_gguf_of_another_model_is_refused(tmp_path: Path) -> None:
    base = tiny_model("llama")
    folder = random_peft_adapter(base, tmp_path / "peft", targets=TARGETS)
    file = write_llama_cpp_adapter(tmp_path / "a.gguf", folder, alpha=8)
    with pytest.raises(BaseModelMismatchError, match="'llama'"):
        convert_to_peft(file, tmp_path / "out", base=saved(tiny_model("qwen2"), tmp_path / "qwen2"))
    with pytest.raises(UnsupportedAdapterError, match="'gpt2'"):
        convert_to_peft(file, tmp_path / "out", base=saved(tiny_model("gpt2"), tmp_path / "gpt2"))
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(AdapterFormatError, match="GGUF"):
        convert_to_peft(file, tmp_path / "out", base=saved(base, tmp_path / "base"))


def test_model_file_is_no_adapter(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("blk.0.attn_q.weight", np.zeros((2, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedAdapterError, match="has the type None"):
        convert_to_peft(tmp_path / "model.gguf", tmp_path / "out", base=saved(tiny_model("llama"), tmp_path / "base"))


@pytest.mark.timeout(20)
def test_pipe_and_endless_settings_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.gguf")
    with pytest.raises(AdapterFormatError, match="no regular file"):
        convert_to_peft(tmp_path, tmp_path / "out", base=saved(tiny_model("llama"), tmp_path / "base"))
    folder = as_pickle(random_peft_adapter(tiny_model("llama"), tmp_path / "bin", targets=("q_proj",)))
    os.truncate(folder / "adapter_config.json", 1 << 33)
    with pytest.raises(AdapterFormatError, match="bytes"):
        convert_to_peft(folder, tmp_path / "out")


# Folders


def test_old_names_are_written_as_the_base_models(tmp_path: Path) -> None:
    base = tiny_model("llama")
    folder = random_peft_adapter(base, tmp_path / "peft", targets=("q_proj",))
    expected = peft_logits(base, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    renamed = {
        name.replace("model.model.", "model.").replace(".weight", ".default.weight"): t for name, t in tensors.items()
    }
    save_file(renamed, folder / "adapter_model.safetensors")
    convert_to_peft(folder, tmp_path / "out", base=saved(base, tmp_path / "base"))
    assert load_file(tmp_path / "out" / "adapter_model.safetensors").keys() == tensors.keys()
    assert_close(peft_logits(base, tmp_path / "out"), expected, "PEFT")


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    base = tiny_model("llama")
    folder = random_peft_adapter(base, tmp_path / "peft", targets=("q_proj",))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(AdapterExistsError, match="exists already"):
        convert_to_peft(folder, folder)
    (tmp_path / "a.gguf").write_bytes(b"mine")
    with pytest.raises(OutputError, match="exists"):
        convert_to_gguf(folder, tmp_path / "a.gguf", base=saved(base, tmp_path / "base"))
    assert (tmp_path / "a.gguf").read_bytes() == b"mine"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_null_targets_are_written_by_name(tmp_path: Path) -> None:
    base = tiny_model("llama")
    folder = random_peft_adapter(base, tmp_path / "peft", targets=("q_proj", "v_proj"))
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"target_modules": None}))
    adapter = convert_to_peft(folder, tmp_path / "out")
    assert set(adapter.config.target_modules or ()) == set(adapter.layers)
    assert_close(peft_logits(base, tmp_path / "out"), peft_logits(base, folder), "PEFT")
