import json
from pathlib import Path
from typing import Any

import pytest
import torch

from loraplex.adapters.peft.reader import ContentShapes, read_adapter
from tests.adapters.folders import LAYER, lora_pair, two_modules, write_folder

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
    ],
)
def test_settings_without_influence_are_accepted(tmp_path: Path, settings: dict[str, Any]) -> None:
    adapter = read_adapter(write_folder(tmp_path, settings))
    assert len(adapter.layers) == 2
    assert adapter.config.alora_invocation_tokens is None


def test_settings_file_of_peft_is_read_in_its_order(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["rank_pattern"] = {"self_attn.q_proj": 4, "q_proj": 16}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    assert read_adapter(folder).layers[Q_PROJ].rank == 4
