"""Quantized bases as users load them: from checkpoints, with a config, dequantized, or refused by name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    FineGrainedFP8Config,
    GptOssConfig,
    GptOssForCausalLM,
    TorchAoConfig,
)

from loraplex import Engine, EngineConfig, MultiLoraModel
from loraplex.errors import BaseModelError, ConfigError
from loraplex.layers.quantized.kinds import quantized_modules
from loraplex.training import TrainConfig, train_adapters
from tests.quantized.bases import KINDS, kinds, load, write_plain
from tests.tiny_models import VOCAB_SIZE
from tests.training.tiny_jobs import tiny_job

FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return write_plain(tmp_path_factory.mktemp("plain"))


def logits_of(base):
    with torch.no_grad():
        return base(input_ids=torch.arange(3, 15)[None]).logits


@pytest.mark.parametrize("kind", kinds(*KINDS))
def test_a_config_quantizes_a_plain_checkpoint_as_transformers_does(plain, kind):
    base = load(plain, kind)
    model = MultiLoraModel.from_pretrained(plain, dtype="float32", quantization_config=KINDS[kind].config())
    assert len(list(quantized_modules(model.base))) == 14
    assert not any(parameter.requires_grad for parameter in model.base.parameters())
    assert torch.equal(logits_of(model.base), logits_of(base))


@pytest.mark.parametrize("kind", kinds("nf4", "int8", "torchao-int8"))
@pytest.mark.parametrize("has_run", [False, True])
def test_a_quantized_checkpoint_needs_no_config(plain, kind, has_run, tmp_path):
    base = load(plain, kind)
    expected = logits_of(load(plain, kind))
    if has_run:
        model = MultiLoraModel(base)
        model(torch.arange(3, 15)[None])
        model.close()
    base.save_pretrained(tmp_path)
    model = MultiLoraModel.from_pretrained(tmp_path, dtype="float32")
    assert len(list(quantized_modules(model.base))) == 14
    assert torch.equal(logits_of(model.base), expected)


@pytest.mark.needs("bitsandbytes")
@pytest.mark.needs("torchao")
def test_a_config_of_another_method_than_the_checkpoints_is_refused(plain, tmp_path):
    load(plain, "nf4").save_pretrained(tmp_path)
    config = KINDS["torchao-int8"].config()
    with pytest.raises(ConfigError, match="bitsandbytes, quantization_config is of torchao"):
        MultiLoraModel.from_pretrained(tmp_path, quantization_config=config)
    with pytest.raises(ConfigError, match="weights='int8'"):
        MultiLoraModel.from_pretrained(tmp_path, weights="int8")


# Dequantized at load


def fp8(name, weight):
    """Blocks of 32 x 32 values in 8 bits, with a scale each."""
    out, in_ = weight.shape
    blocks = weight.view(out // 32, 32, in_ // 32, 32)
    scales = blocks.abs().amax((1, 3)) / 448
    held = (blocks / scales[:, None, :, None]).reshape(out, in_).to(torch.float8_e4m3fn)
    values = (held.float().view_as(blocks) * scales[:, None, :, None]).reshape(out, in_)
    return {name: held, f"{name}_scale_inv": scales}, values


def integers(name, weight):
    scales = weight.abs().amax(dim=1, keepdim=True) / 127
    held = (weight / scales).round().to(torch.int8)
    return {name: held, f"{name}_scale": scales}, held.float() * scales


FP8 = {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"}
INTEGERS = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
        }
    },
}


def write_variant(plain, folder, convert, settings):
    """The checkpoint with other tensors for its linear weights; and the values that they have."""
    folder.mkdir()
    config = json.loads((plain / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    tensors, values = {}, {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        held, values[name] = convert(name, tensor) if "proj" in name else ({name: tensor}, tensor)
        tensors |= held
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return values


@pytest.mark.parametrize(
    ("convert", "settings"),
    [
        pytest.param(fp8, FP8, id="fp8"),
        pytest.param(integers, INTEGERS, id="compressed-tensors", marks=pytest.mark.needs("compressed_tensors")),
    ],
)
def test_checkpoints_without_a_product_here_are_dequantized(plain, convert, settings, tmp_path):
    values = write_variant(plain, tmp_path / "base", convert, settings)
    base = MultiLoraModel.from_pretrained(tmp_path / "base", dtype="float32").base
    assert not hasattr(base.config, "quantization_config")
    for name, expected in values.items():
        assert torch.equal(base.get_parameter(name), expected), name


def test_mxfp4_experts_are_dequantized(tmp_path):
    config = GptOssConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_local_experts=2,
        num_experts_per_tok=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        pad_token_id=0,
    )
    GptOssForCausalLM(config).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "quantization_config": {"quant_method": "mxfp4"}}))
    tensors, values = load_file(tmp_path / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, in_, out = tensors.pop(name).shape
        blocks = torch.randint(0, 256, (experts, out, in_ // 32, 16), dtype=torch.uint8)
        scales = torch.randint(120, 126, (experts, out, in_ // 32), dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        both = torch.stack([FP4[(blocks & 15).long()], FP4[(blocks >> 4).long()]], dim=-1)  # the low half first
        scaled = both.flatten(-2) * 2.0 ** (scales.float() - 127).unsqueeze(-1)
        values[name] = scaled.flatten(-2).transpose(1, 2)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    base = MultiLoraModel.from_pretrained(tmp_path, dtype="bfloat16").base
    assert len(values) == 2
    for name, expected in values.items():
        assert torch.equal(base.get_parameter(name), expected.bfloat16()), name


# Refused


@pytest.mark.parametrize("method", ["auto-round", "aqlm", "quanto", "eetq", "bitnet", "nvfp4"])
def test_other_methods_are_refused_by_name_with_the_fix(plain, method, tmp_path):
    write_variant(plain, tmp_path / "base", fp8, {"quant_method": method, "bits": 4, "group_size": 32})
    with pytest.raises(BaseModelError, match=rf"'{method}' are not supported.*load_in_4bit=True"):
        MultiLoraModel.from_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(plain)
    base.config.quantization_config = {"quant_method": method}
    with pytest.raises(BaseModelError, match=rf"'{method}' are not supported"):
        MultiLoraModel(base)
    with pytest.raises(BaseModelError, match=rf"'{method}' are not supported"):
        train_adapters(base, None, jobs=[tiny_job(tmp_path, "a")], config=TrainConfig(output=tmp_path / "out"))


def test_a_model_in_a_form_that_is_dequantized_here_is_refused_as_it_is(plain):
    base = AutoModelForCausalLM.from_pretrained(plain)
    base.config.quantization_config = FineGrainedFP8Config()
    with pytest.raises(BaseModelError, match=r"fp8.*FineGrainedFP8Config\(dequantize=True\)"):
        MultiLoraModel(base)


def test_a_config_that_would_be_dequantized_at_once_is_refused(plain):
    with pytest.raises(ConfigError, match="fp8 would be dequantized"):
        MultiLoraModel.from_pretrained(plain, quantization_config=FineGrainedFP8Config())


@pytest.mark.needs("torchao")
def test_weights_whose_inputs_are_quantized_too_are_refused(plain):
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    config = TorchAoConfig(Int8DynamicActivationInt8WeightConfig())
    with pytest.raises(BaseModelError, match=r"quantizes its inputs too \(torchao, Int8Tensor\).*Int8WeightOnlyConfig"):
        MultiLoraModel(load(plain, "torchao-int8", config=config))


@pytest.mark.needs("bitsandbytes")
def test_weights_that_are_quantized_at_every_call_are_refused(plain):
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_has_fp16_weight=True)
    with pytest.raises(BaseModelError, match="llm_int8_has_fp16_weight"):
        MultiLoraModel(load(plain, "int8", config=config))


@pytest.mark.needs("bitsandbytes")
def test_the_same_bits_in_any_batch_are_not_promised(plain):
    with pytest.raises(ConfigError, match="batch_invariant"):
        Engine(MultiLoraModel(load(plain, "nf4")), EngineConfig(batch_invariant=True))


@pytest.mark.needs("torchao")
def test_a_config_that_needs_a_gpu_says_so(plain):
    from torchao.quantization import Int4WeightOnlyConfig

    with pytest.raises(BaseModelError, match="can't load the base model"):
        MultiLoraModel.from_pretrained(plain, quantization_config=TorchAoConfig(Int4WeightOnlyConfig(group_size=32)))


def test_a_missing_package_is_named_with_its_extra(plain, monkeypatch):
    monkeypatch.setattr("loraplex.models.checkpoints.quantized_base.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"bitsandbytes needs bitsandbytes.*loraplex\[quantized\]"):
        MultiLoraModel.from_pretrained(plain, quantization_config=BitsAndBytesConfig(load_in_4bit=True))


def test_plain_modules_are_not_taken_for_quantized_ones():
    assert not list(quantized_modules(nn.Sequential(nn.Linear(3, 4), nn.Embedding(3, 4), nn.ReLU())))
