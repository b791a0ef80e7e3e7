import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from loraplex.adapters.peft.reader import ContentShapes, read_adapter
from loraplex.errors import AdapterFormatError, UnsupportedAdapterError
from tests.adapters.folders import LAYER, lora_pair, shard, two_modules, write_folder

Q_PROJ = "model.layers.0.self_attn.q_proj"
Q_A = f"{LAYER}.q_proj.lora_A.weight"
Q_B = f"{LAYER}.q_proj.lora_B.weight"


def test_tensors_are_those_of_the_file_with_b_transposed(tmp_path: Path) -> None:
    tensors = two_modules()
    adapter = read_adapter(write_folder(tmp_path, tensors=tensors))
    assert set(adapter.layers) == {Q_PROJ, "model.layers.0.self_attn.v_proj"}
    weights = adapter.layers[Q_PROJ]
    assert weights.lora_a.equal(tensors[Q_A])
    assert weights.lora_b.equal(tensors[Q_B].t())
    assert (weights.kind, weights.scaling, weights.magnitude) == ("linear", 2.0, None)
    assert adapter.config.base_model_name_or_path == "tiny/llama"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_of_the_file_is_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in two_modules().items()}
    weights = read_adapter(write_folder(tmp_path, tensors=tensors)).layers[Q_PROJ]
    assert weights.lora_a.dtype == weights.lora_b.dtype == dtype
    assert weights.lora_a.equal(tensors[Q_A])


@pytest.mark.parametrize("rank", [1, 4])
def test_tensors_are_contiguous_and_survive_an_overwritten_file(tmp_path: Path, rank: int) -> None:
    tensors = lora_pair(f"{LAYER}.q_proj", rank=rank)
    weights = read_adapter(write_folder(tmp_path, {"r": rank}, tensors)).layers[Q_PROJ]
    file = tmp_path / "adapter_model.safetensors"
    with file.open("r+b") as stream:  # in place: a mapped tensor would change with it
        stream.write(b"\xff" * file.stat().st_size)
    assert weights.lora_a.equal(tensors[Q_A])
    assert weights.lora_b.equal(tensors[Q_B].t())
    for tensor in (weights.lora_a, weights.lora_b):
        assert tensor.is_contiguous()
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def test_rank_and_alpha_patterns_apply_to_each_module(tmp_path: Path) -> None:
    settings = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 1}}
    tensors = lora_pair(f"{LAYER}.q_proj", rank=2) | lora_pair(f"{LAYER}.v_proj")
    layers = read_adapter(write_folder(tmp_path, settings, tensors)).layers
    assert layers[Q_PROJ].rank == 2
    assert layers[Q_PROJ].scaling == 8 / 2
    assert layers["model.layers.0.self_attn.v_proj"].scaling == 1 / 4


@pytest.mark.parametrize("suffix", ["lora_magnitude_vector", "lora_magnitude_vector.weight"])
def test_dora_magnitude_is_read_under_both_names(tmp_path: Path, suffix: str) -> None:
    magnitude = torch.rand(24)
    tensors = lora_pair(f"{LAYER}.q_proj") | {f"{LAYER}.q_proj.{suffix}": magnitude}
    weights = read_adapter(write_folder(tmp_path, {"use_dora": True}, tensors)).layers[Q_PROJ]
    assert weights.magnitude is not None
    assert weights.magnitude.equal(magnitude)


def test_embedding_factors_are_read(tmp_path: Path) -> None:
    module = "base_model.model.model.embed_tokens"
    tensors = {
        f"{module}.lora_embedding_A": torch.randn(4, 50),
        f"{module}.lora_embedding_B": torch.randn(16, 4),
    }
    settings = {"target_modules": ["embed_tokens"]}
    weights = read_adapter(write_folder(tmp_path, settings, tensors)).layers["model.embed_tokens"]
    assert weights.kind == "embedding"
    assert (weights.shape.in_features, weights.shape.out_features) == (50, 16)


def test_copies_of_base_weights_are_kept_apart(tmp_path: Path) -> None:
    copy = torch.randn(24, 16)
    module = "base_model.model.lm_head"
    folder = write_folder(tmp_path, tensors={**lora_pair(module), f"{module}.base_layer.weight": copy})
    plain = read_adapter(folder)
    assert set(plain.layers) == {"lm_head"}
    assert plain.has_factors_alone
    seen: list[ContentShapes] = []
    adapter = read_adapter(folder, check_contents=lambda _, shapes: seen.append(shapes))
    assert seen == [ContentShapes(replaced={"lm_head.weight": (24, 16)}, token_rows={})]
    assert adapter.replaced.keys() == {"lm_head.weight"}
    assert adapter.replaced["lm_head.weight"].equal(copy)


@pytest.mark.parametrize(
    "settings",
    [
        {"peft_version": "0.21.2", "revision": "main", "inference_mode": True, "auto_mapping": {"a": "b"}},
        {"task_type": "CAUSAL_LM", "bias": "none", "modules_to_save": [], "target_parameters": None},
        {
            "megatron_core": "megatron.core",
            "qalora_group_size": 16,
            "loftq_config": {},
            "eva_config": {"rho": 2.0},
        },
        {"use_qalora": False, "lora_bias": False, "layer_replication": None, "trainable_token_indices": None},
        {"fan_in_fan_out": True, "lora_dropout": 0.1, "layers_pattern": None, "layers_to_transform": None},
        {"ensure_weight_tying": True},  # no embedding is targeted
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": False},
        {"a_future_setting": None, "another": False, "more": {}},
        {"alora_invocation_tokens": []},
        dict.fromkeys(("use_dora", "use_rslora", "fan_in_fan_out", "lora_bias", "use_qalora", "bias")),
        dict.fromkeys(("use_dora", "use_rslora", "fan_in_fan_out", "lora_bias", "use_qalora"), 0),
        {"init_lora_weights": 1, "modules_to_save": None, "rank_pattern": None, "alpha_pattern": None},
        {"unsloth_fixed": True, "auto_mapping": {"base_model_class": "x", "unsloth_fixed": True}},
        {"enable_lora": None, "merge_weights": False, "num_layers": 32, "token_dim": 4096},  # of PEFT's first versions
        {"lora_dtype": "fp32", "lorap_lr_ratio": 16.0, "lorap_emb_lr": 1e-6},  # of ms-swift
    ],
    ids=lambda settings: " ".join(settings)[:60],
)
def test_settings_without_influence_are_accepted(tmp_path: Path, settings: dict[str, Any]) -> None:
    adapter = read_adapter(write_folder(tmp_path, settings))
    assert len(adapter.layers) == 2
    assert adapter.config.alora_invocation_tokens is None


@pytest.mark.parametrize("value", [1, True])
def test_switches_that_are_on_are_on(tmp_path: Path, value: object) -> None:
    adapter = read_adapter(write_folder(tmp_path, {"use_rslora": value}))
    assert adapter.config.use_rslora is True
    assert adapter.layers[Q_PROJ].scaling == 8 / 2


@pytest.mark.parametrize("value", [2, "true", [], {}, 0.5])
def test_what_is_no_switch_is_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(AdapterFormatError, match="use_rslora"):
        read_adapter(write_folder(tmp_path, {"use_rslora": value}))


def test_unknown_settings_without_a_value_are_reported_and_others_ignored_on_request(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_folder(tmp_path, {"a_future_switch": False, "a_future_setting": 3, "peft_version": "0.30"})
    with pytest.raises(UnsupportedAdapterError, match="a_future_setting"):
        read_adapter(folder)
    assert len(read_adapter(folder, ignore_unknown=True).layers) == 2
    assert "{'a_future_switch': False, 'a_future_setting': 3}" in caplog.text
    caplog.clear()
    read_adapter(write_folder(tmp_path, {"a_future_switch": None}))
    assert "a_future_switch" in caplog.text
    caplog.clear()
    read_adapter(write_folder(tmp_path, {"unsloth_fixed": True}))
    assert caplog.text == ""


def test_null_targets_stay_null_without_a_base_model(tmp_path: Path) -> None:
    assert read_adapter(write_folder(tmp_path, {"target_modules": None})).config.target_modules is None


def test_shards_are_read_as_one_file(tmp_path: Path) -> None:
    expected = read_adapter(write_folder(tmp_path))
    shard(tmp_path)
    adapter = read_adapter(tmp_path)
    assert adapter.places is None
    assert adapter.layers.keys() == expected.layers.keys()
    for path, weights in expected.layers.items():
        assert adapter.layers[path].lora_a.equal(weights.lora_a)
        assert adapter.layers[path].lora_b.equal(weights.lora_b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index["weight_map"].popitem(), "disagree"),
        (lambda index: index.pop("weight_map"), "no weight_map"),
        (lambda index: index.update(weight_map={"a": "../../secret.safetensors"}), "beside it"),
        (lambda index: index.update(weight_map={"a": "/etc/passwd"}), "beside it"),
        (lambda index: index.update(weight_map={"a": "other.safetensors"}), "'other.safetensors', which is missing"),
        (lambda index: index.update(weight_map={str(i): f"{i}.safetensors" for i in range(300)}), "256 at most"),
        (lambda index: index.update(weight_map={"a": 3}), "no weight_map"),
    ],
)
def test_index_that_does_not_fit_its_shards_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    index = shard(write_folder(tmp_path))
    content = json.loads(index.read_text())
    change(content)
    index.write_text(json.dumps(content))
    with pytest.raises(AdapterFormatError, match=message):
        read_adapter(tmp_path)


def test_settings_file_of_peft_is_read_in_its_order(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["rank_pattern"] = {"self_attn.q_proj": 4, "q_proj": 16}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    assert read_adapter(folder).layers[Q_PROJ].rank == 4
