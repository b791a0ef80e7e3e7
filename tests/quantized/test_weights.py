"""The values of quantized weights, and what is made of them: DoRA, counts, what is told about other precisions."""

import logging
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from loraplex import MultiLoraModel
from loraplex.adapters.peft.reader import read_adapter
from loraplex.adapters.peft.writer import write_adapter
from loraplex.layers.quantized.kinds import dequantized_weight, num_weights, quantized_modules
from tests.parity.oracle import PeftOracle, padded_batch
from tests.quantized.bases import TARGETS, kinds, load, write_plain
from tests.tiny_models import VOCAB_SIZE, random_peft_adapter

KINDS = ("nf4", "int8", "torchao-int8", "torchao-int4", "hqq")
MODULES = 14  # linear ones of two layers


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return write_plain(tmp_path_factory.mktemp("plain"))


def dense(plain, base):
    """A model without quantization that has a quantized one's values."""
    model = AutoModelForCausalLM.from_pretrained(plain)
    for path, module, _ in quantized_modules(base):
        model.get_submodule(path).weight = nn.Parameter(dequantized_weight(module).float().clone())
    return model.eval()


@pytest.mark.parametrize("kind", kinds(*KINDS))
@torch.no_grad()
def test_values_are_those_that_the_module_multiplies_with(plain, kind):
    base = load(plain, kind)
    for _ in range(2):  # bitsandbytes puts 4-bit weights in another order when they first run
        found = list(quantized_modules(base))
        assert len(found) == MODULES
        for path, module, _ in found:
            values = dequantized_weight(module).float()
            assert values.shape == (module.out_features, module.in_features), path
            x = torch.randn(5, module.in_features)
            expected = x @ values.t()
            assert (module(x) - expected).norm() <= 2e-2 * expected.norm(), path


@pytest.mark.parametrize("kind", kinds(*KINDS))
@torch.no_grad()
def test_dora_is_that_of_peft_on_the_dequantized_weights(plain, kind, tmp_path):
    base = load(plain, kind)
    values = dense(plain, base)
    folder = random_peft_adapter(values, tmp_path / "dora", targets=TARGETS, options={"use_dora": True})
    ids, mask = padded_batch(2, 9, "left", VOCAB_SIZE)
    expected = PeftOracle(values, {"dora": folder}).logits("dora", ids[0], mask[0])
    without = values(input_ids=ids[:1], attention_mask=mask[:1]).logits[0]
    rounding = (base(input_ids=ids[:1], attention_mask=mask[:1]).logits[0] - without).abs().max()
    model = MultiLoraModel(base)
    model.load_adapter("dora", folder)
    logits = model(ids, mask, adapters=["dora", None]).logits[0]
    span = expected.max() - expected.min()
    assert (logits - expected).abs().max() <= 1e-3 * span + 3 * rounding
    assert (expected - without).abs().max() > 0.1 * span


@pytest.mark.needs("bitsandbytes")
@pytest.mark.parametrize("double", [True, False])
@torch.no_grad()
def test_4_bit_weights_that_ran_before_anybody_kept_their_scales_have_rounded_ones(plain, double):
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double)
    base = load(plain, "nf4", config=config)
    module = base.model.layers[0].mlp.up_proj
    before = dequantized_weight(module).clone()
    base(input_ids=torch.arange(3, 9)[None])
    assert (dequantized_weight(module) - before).abs().max() <= 2**-8 * before.abs().max()


@pytest.mark.needs("bitsandbytes")
@torch.no_grad()
def test_4_bit_weights_of_shapes_that_the_avx512_kernel_lacks_are_multiplied_in_another_way(tmp_path):
    plain = write_plain(tmp_path, intermediate_size=96)  # down_proj reads 1.5 blocks of 64
    base = load(plain, "nf4")
    expected = dense(plain, base)
    ids = torch.randint(3, VOCAB_SIZE, (2, 7))
    theirs = expected(input_ids=ids).logits
    ours = MultiLoraModel(base)(ids).logits
    assert (ours - theirs).abs().max() <= 2e-2 * (theirs.max() - theirs.min())


@pytest.mark.parametrize("kind", kinds(*KINDS))
def test_weights_are_counted_as_what_they_stand_for(plain, kind):
    assert num_weights(load(plain, kind)) == num_weights(AutoModelForCausalLM.from_pretrained(plain))


@pytest.mark.parametrize("kind", kinds(*KINDS))
def test_a_closed_model_is_as_it_was(plain, kind, tmp_path):
    base = load(plain, kind)
    ids = torch.randint(3, VOCAB_SIZE, (2, 7))
    with torch.no_grad():
        base(input_ids=ids)
        before, classes = base(input_ids=ids).logits, [type(module) for module in base.modules()]
        model = MultiLoraModel(base)
        model.load_adapter(
            "a", random_peft_adapter(AutoModelForCausalLM.from_pretrained(plain), tmp_path, targets=TARGETS)
        )
        assert not torch.equal(model(ids, adapters=["a", "a"]).logits, before)
        model.close()
        assert torch.equal(base(input_ids=ids).logits, before)
    assert [type(module) for module in base.modules()] == classes


@pytest.mark.needs("bitsandbytes")
def test_an_adapter_of_another_precision_is_told(plain, tmp_path, caplog):
    folder = random_peft_adapter(AutoModelForCausalLM.from_pretrained(plain), tmp_path / "a", targets=TARGETS)
    adapter = read_adapter(folder)
    named = {
        "unsloth/llama-3-8b-bnb-4bit": {"nf4": False, "int8": True, None: True},
        "org/llama-3-8b": {"nf4": False, None: False},
    }
    for base_name, told_by_kind in named.items():
        named_so = replace(adapter, config=replace(adapter.config, base_model_name_or_path=base_name))
        write_adapter(named_so, tmp_path / base_name.replace("/", "-"))
        for kind, is_told in told_by_kind.items():
            base = AutoModelForCausalLM.from_pretrained(plain) if kind is None else load(plain, kind)
            caplog.clear()
            with caplog.at_level(logging.WARNING, "loraplex"):
                MultiLoraModel(base).load_adapter("a", tmp_path / base_name.replace("/", "-"))
            assert ("bnb-4bit" in caplog.text) == is_told, (base_name, kind)
