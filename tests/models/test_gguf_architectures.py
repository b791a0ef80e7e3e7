"""GGUF files of other architectures than Llama, as llama.cpp's converter writes them: the model that they were made of.

Names are those of gguf's own table, which the converter uses; what it does to values and settings beside that is here.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from loraplex import MultiLoraModel
from loraplex.errors import BaseModelError
from tests.tiny_models import VOCAB_SIZE

COMMON = {"vocab_size": VOCAB_SIZE, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
COMMON |= {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
}
COMMON |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def theta(value: float, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": value, **more}}


class Case(NamedTuple):
    config: str  # transformers' class
    options: dict[str, Any]
    norm_plus_one: bool = False  # llama.cpp's norms multiply by the weight, Gemma's by 1 + weight
    layer_norm: bool = False  # not RMSNorm


CASES = {
    "gemma2": Case("Gemma2Config", {"head_dim": 32, "query_pre_attn_scalar": 256}, norm_plus_one=True),
    "gemma3": Case("Gemma3TextConfig", {"head_dim": 32, "query_pre_attn_scalar": 256}, norm_plus_one=True),
    "stablelm": Case(
        "StableLmConfig",
        {"use_qkv_bias": True, "tie_word_embeddings": False, **theta(30000.0, partial_rotary_factor=0.5)},
        layer_norm=True,
    ),
    "starcoder2": Case("Starcoder2Config", {"use_bias": True, **theta(999999.0)}, layer_norm=True),
    "phi3": Case(
        "Phi3Config", {"tie_word_embeddings": False, "vocab_size": 32064, **theta(20000.0, partial_rotary_factor=0.75)}
    ),
    "llama": Case("LlamaConfig", {"tie_word_embeddings": False, **theta(500000.0)}),
    "qwen2": Case("Qwen2Config", {"tie_word_embeddings": False, **theta(1000000.0)}),
}


def make(architecture: str) -> PreTrainedModel:
    case = CASES[architecture]
    config: PreTrainedConfig = getattr(transformers, case.config)(**{**COMMON, **case.options})
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):  # which start as ones and zeros
            parameter.data += torch.randn(parameter.shape) * 0.2
    return model


def write(
    path: Path,
    architecture: str,
    model: PreTrainedModel,
    kind: gguf.GGMLQuantizationType,
    *,
    settings: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
    extra: dict[str, Tensor] | None = None,
) -> Path:
    case, config = CASES[architecture], model.config
    writer = gguf.GGUFWriter(path, architecture)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    rope = config.rope_parameters
    if "rope_theta" in rope:
        writer.add_rope_freq_base(rope["rope_theta"])
        writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
    if architecture.startswith("gemma"):
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
        writer.add_sliding_window(config.sliding_window)
    if case.layer_norm:
        writer.add_layer_norm_eps(getattr(config, "norm_epsilon", None) or config.layer_norm_eps)
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(config.vocab_size)])
    writer.add_token_merges([])
    settings(writer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], config.num_hidden_layers)
    tensors = {name: value for name, value in model.state_dict().items() if name != "lm_head.weight" or not tied(model)}
    for name, value in tensors.items():
        values = value.float().numpy()
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        if case.norm_plus_one and name.endswith("norm.weight"):
            values = values + 1
        own = kind if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        named = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(named, gguf.quants.quantize(values, own), raw_dtype=own)
    for name, value in (extra or {}).items():
        writer.add_tensor(name, value.numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tied(model: PreTrainedModel) -> bool:
    return bool(model.config.tie_word_embeddings)


@torch.no_grad()
def distance(found: Any, expected: Any) -> float:
    ids = torch.arange(3, 40).unsqueeze(0)
    logits = expected(input_ids=ids).logits
    return float((found(input_ids=ids).logits.float() - logits).abs().max() / (logits.max() - logits.min()))


@pytest.mark.parametrize("architecture", CASES)
def test_a_file_is_the_model_that_it_was_made_of(architecture: str, tmp_path: Path) -> None:
    plain = make(architecture)
    file = write(tmp_path / "a.gguf", architecture, plain, gguf.GGMLQuantizationType.F32)
    base = MultiLoraModel.from_pretrained(file).base
    assert type(base) is type(plain)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(base.state_dict()[name], value, rtol=1e-6, atol=1e-6, msg=name)
    assert distance(base, plain) < 1e-5


@pytest.mark.parametrize("architecture", CASES)
def test_blocks_of_8_bits_are_in_the_models_order(architecture: str, tmp_path: Path) -> None:
    plain = make(architecture)
    file = write(tmp_path / "a.gguf", architecture, plain, gguf.GGMLQuantizationType.Q8_0)
    theirs = MultiLoraModel.from_pretrained(file).base
    ours = MultiLoraModel.from_pretrained(file, weights="int8").base
    assert distance(theirs, plain) < 0.05
    assert distance(ours, theirs) < 0.05


def llama3(factor: float) -> dict[str, Any]:
    rope = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return {"rope_parameters": rope | {"rope_theta": 500000.0, "original_max_position_embeddings": 8192}}


@pytest.mark.parametrize("weights", ["auto", "int8"])
def test_llama_3s_factors_of_frequencies_are_the_settings_that_they_come_from(weights: str, tmp_path: Path) -> None:
    """llama.cpp's converter writes what the settings give, and not the settings."""
    plain = make("llama")
    scaled = type(plain)(type(plain.config)(**{**COMMON, "tie_word_embeddings": False, **llama3(32.0)})).eval()
    scaled.load_state_dict(plain.state_dict())
    factors = plain.model.rotary_emb.inv_freq / scaled.model.rotary_emb.inv_freq
    assert factors.max() > 31
    kind = gguf.GGMLQuantizationType.F32
    file = write(tmp_path / "a.gguf", "llama", plain, kind, extra={"rope_freqs.weight": factors})
    base = MultiLoraModel.from_pretrained(file, weights=weights).base
    assert base.config.rope_parameters["rope_type"] == "llama3"
    assert base.config.rope_parameters["factor"] == pytest.approx(32)
    if weights == "auto":
        assert distance(base, scaled) < 1e-5
    others = write(tmp_path / "b.gguf", "llama", plain, kind, extra={"rope_freqs.weight": factors + 0.5})
    with pytest.raises(BaseModelError, match=r"rope_freqs\.weight, which aren't those of Llama 3"):
        MultiLoraModel.from_pretrained(others, weights=weights)


def test_gemma_3s_full_attention_has_its_scaling(tmp_path: Path) -> None:
    """Those of 4 B parameters and more: linear, by 8, in the layers without a window."""
    plain = make("gemma3")
    full = plain.config.rope_parameters["full_attention"] | {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e5}
    options = plain.config.to_dict() | {"rope_parameters": plain.config.rope_parameters | {"full_attention": full}}
    layers = {"layer_types": ["sliding_attention"] * 5 + ["full_attention"], "num_hidden_layers": 6}
    scaled = type(plain)(type(plain.config)(**{**options, **layers})).eval()

    def settings(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_freq_base(2e5)
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(8.0)

    file = write(tmp_path / "a.gguf", "gemma3", scaled, gguf.GGMLQuantizationType.F32, settings=settings)
    assert distance(MultiLoraModel.from_pretrained(file).base, scaled) < 1e-5


def test_what_the_reader_leaves_out_is_refused(tmp_path: Path) -> None:
    kind = gguf.GGMLQuantizationType.F32

    def refused(name: str, told: str, architecture: str, **options: Any) -> None:
        file = write(tmp_path / f"{name}.gguf", architecture, make(architecture), kind, **options)
        with pytest.raises(BaseModelError, match=told):
            MultiLoraModel.from_pretrained(file)

    yarn = gguf.RopeScalingType.YARN
    refused("a", r"rope\.scaling\.type 'yarn'", "qwen2", settings=lambda writer: writer.add_rope_scaling_type(yarn))
    refused("b", "rope_factors_long", "phi3", extra={"rope_factors_long.weight": torch.ones(6)})
    refused("c", r"tensors \['blk\.0\.attn_output\.bias'\]", "qwen2", extra={"blk.0.attn_output.bias": torch.ones(64)})


def test_queries_of_gemma_27b_have_their_own_scale() -> None:
    """As llama.cpp tells that size by its number of layers: the file doesn't say."""
    from types import SimpleNamespace

    from loraplex.models.checkpoints.gguf_settings import complete_config

    reader = SimpleNamespace(fields={"general.architecture": SimpleNamespace(contents=lambda: "gemma2")}, tensors=[])
    for layers, scalar in ((46, 144), (42, 256)):
        config = transformers.Gemma2Config(hidden_size=4608, num_attention_heads=32, num_hidden_layers=layers)
        complete_config(Path("a.gguf"), config, reader)
        assert config.query_pre_attn_scalar == scalar
