"""A GGUF file's blocks of 8 bits are held as they are; what can't be read is refused by name."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from loraplex import MultiLoraModel
from loraplex.errors import BaseModelError, ConfigError
from loraplex.kernels.int8_weight import Int8Weight
from tests.tiny_models import VOCAB_SIZE, linear_targets, random_peft_adapter, tiny_model

pytestmark = pytest.mark.needs("compiler")

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def file_name(path: str) -> str:
    module = path.removesuffix(".weight")
    if module in TOP:
        return f"{TOP[module]}.weight"
    _, _, layer, rest = module.split(".", 3)
    return f"blk.{layer}.{NAMES[rest]}.weight"


def permuted(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """As llama.cpp's converter orders the rows of q and k."""
    halves = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_file(path, model, *, kinds=None, is_tied=False, extra=()):
    """`kinds`: by the name in the file, another type than Q8_0 of a matrix."""
    config, kinds = model.config, kinds or {}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(VOCAB_SIZE)])
    writer.add_token_merges([])
    for name, weight in model.state_dict().items():
        if is_tied and name == "lm_head.weight":
            continue
        values = weight.float().numpy()
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name:
                values = permuted(values, heads)
        kind = GGMLQuantizationType[kinds.get(file_name(name), "Q8_0" if values.ndim == 2 else "F32")]
        writer.add_tensor(file_name(name), quants.quantize(values, kind), raw_dtype=kind)
    for name in extra:
        writer.add_tensor(name, np.ones(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def q8_0(weight: torch.Tensor) -> torch.Tensor:
    blocks = quants.quantize(weight.detach().float().numpy(), GGMLQuantizationType.Q8_0)
    return torch.from_numpy(quants.dequantize(blocks, GGMLQuantizationType.Q8_0))


@pytest.mark.parametrize("is_tied", [False, True])
def test_the_values_are_those_of_the_blocks(tmp_path, is_tied):
    plain = tiny_model("llama")
    file = write_file(tmp_path / "tiny.gguf", plain, is_tied=is_tied)
    base = MultiLoraModel.from_pretrained(file, weights="int8").base
    for path, weight in plain.named_parameters():
        found = base.get_parameter(path)
        if is_tied and path == "lm_head.weight":
            weight = plain.get_input_embeddings().weight
        if "proj" in path or path == "lm_head.weight":
            assert isinstance(found, Int8Weight), path
            assert found.group == 32
            assert torch.equal(found.to_values(torch.float32), q8_0(weight)), path
        else:
            expected = q8_0(weight) if weight.ndim == 2 else weight
            assert torch.equal(found, expected.bfloat16()), path
    ids = torch.arange(3, 20).unsqueeze(0)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    with torch.inference_mode():
        ours, expected = base(ids).logits.float(), theirs(ids).logits
    assert (ours - expected).abs().max() <= 0.03 * expected.abs().max()


def test_values_of_16_and_32_bits_are_quantized(tmp_path):
    plain = tiny_model("llama")
    kinds = {"blk.0.attn_q.weight": "F32", "blk.1.attn_q.weight": "F16", "blk.0.ffn_up.weight": "BF16"}
    base = MultiLoraModel.from_pretrained(write_file(tmp_path / "a.gguf", plain, kinds=kinds), weights="int8").base
    for path in ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.up_proj"):
        weight, found = plain.get_submodule(path).weight, base.get_submodule(path).weight
        assert isinstance(found, Int8Weight)
        assert (found.to_values(torch.float32) - weight).abs().max() <= weight.abs().max() / 127


def test_what_cannot_be_read_is_refused_by_name(tmp_path):
    plain = tiny_model("llama")
    file = write_file(tmp_path / "a.gguf", plain, kinds={"blk.0.ffn_up.weight": "Q4_0"})
    with pytest.raises(BaseModelError, match=r"ffn_up.*Q4_0.*Q8_0"):
        MultiLoraModel.from_pretrained(file, weights="int8")
    other = write_file(tmp_path / "b.gguf", plain, extra=["rope_freqs.weight"])
    with pytest.raises(BaseModelError, match="rope_freqs"):
        MultiLoraModel.from_pretrained(other, weights="int8")
    (tmp_path / "c.gguf").write_bytes(b"GGUF" + bytes(40))
    for weights in ("int8", "auto"):
        with pytest.raises(BaseModelError, match=r"c\.gguf"):
            MultiLoraModel.from_pretrained(tmp_path / "c.gguf", weights=weights)


def dequantized(weight: torch.Tensor, kind: GGMLQuantizationType) -> torch.Tensor:
    values = weight.detach().float().numpy()
    return torch.from_numpy(quants.dequantize(quants.quantize(values, kind), kind))


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["Q4_0", "Q5_1", "Q8_0"])
def test_other_types_are_dequantized_to_the_dtype(tmp_path, kind, dtype):
    plain = tiny_model("llama")
    kinds = {file_name(path): kind for path, weight in plain.named_parameters() if "proj" in path}
    file = write_file(tmp_path / "tiny.gguf", plain, kinds=kinds)
    wanted = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    for base in (
        MultiLoraModel.from_pretrained(file, dtype=dtype).base,
        MultiLoraModel.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=dtype).base,
    ):
        assert not hasattr(base.config, "quantization_config")
        for path, weight in plain.named_parameters():
            expected = weight
            if weight.ndim == 2:
                expected = dequantized(weight, GGMLQuantizationType[kind if "proj" in path else "Q8_0"])
            assert torch.equal(base.get_parameter(path), expected.to(wanted)), path


def test_adapters_run_on_a_dequantized_file_as_peft_has_them(tmp_path):
    plain = tiny_model("llama")
    kinds = {file_name(path): "Q4_0" for path, weight in plain.named_parameters() if "proj" in path}
    file = write_file(tmp_path / "tiny.gguf", plain, kinds=kinds)
    folder = random_peft_adapter(plain, tmp_path / "a", targets=linear_targets("llama"))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    model = MultiLoraModel.from_pretrained(file, dtype="float32")
    model.load_adapter("a", folder)
    ids = torch.arange(3, 20).unsqueeze(0)
    with torch.no_grad():
        expected = PeftModel.from_pretrained(theirs, str(folder)).eval()(input_ids=ids).logits
    found = model(ids, adapters=["a"]).logits
    assert (found - expected).abs().max() <= 1e-4 * (expected.max() - expected.min())


def test_a_file_that_is_not_there_or_has_another_config_is_refused(tmp_path):
    write_file(tmp_path / "tiny.gguf", tiny_model("llama"))
    with pytest.raises(BaseModelError, match=r"no file 'other\.gguf'; it has \['tiny\.gguf'\]"):
        MultiLoraModel.from_pretrained(tmp_path, gguf_file="other.gguf")
    with pytest.raises(BaseModelError, match="ends with"):
        MultiLoraModel.from_pretrained(tmp_path, gguf_file="config.json")
    with pytest.raises(BaseModelError, match=r"tiny\.gguf.*hub"):
        MultiLoraModel.from_pretrained("owner/name", gguf_file="tiny.gguf")
    config = BitsAndBytesConfig(load_in_8bit=True)
    with pytest.raises(ConfigError, match="only one of"):
        MultiLoraModel.from_pretrained(tmp_path, gguf_file="tiny.gguf", quantization_config=config)
