"""Generation with the compiled base product against generation with torch's."""

import pytest
import torch

from loraplex import MultiLoraModel
from loraplex.layers.lora_linear import LoraLinear
from tests.tiny_models import VOCAB_SIZE, linear_targets, random_peft_adapter, tiny_model

pytestmark = pytest.mark.needs("compiler")
OPTIONS = {"max_new_tokens": 12, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}


@pytest.fixture(scope="module", params=["llama", "gpt_neox"])
def pair(request, tmp_path_factory):
    """The same model and adapters twice: decoding fast, and with torch's product."""
    folder = random_peft_adapter(
        tiny_model(request.param), tmp_path_factory.mktemp("a") / "a", targets=linear_targets(request.param)
    )
    models = [MultiLoraModel(tiny_model(request.param), fast_decode=fast) for fast in (True, False)]
    for model in models:
        model.load_adapter("a", folder)
    return models


def prompts(num_rows):
    ids = torch.randint(3, VOCAB_SIZE, (num_rows, 7))
    return ids, torch.ones_like(ids)


@pytest.mark.parametrize("adapters", [None, ["a", None, "a:0.5"]])
def test_tokens_and_logits_equal_those_of_torch(pair, adapters):
    fast, plain = (model.generate(*prompts_of(3), adapters=adapters, **OPTIONS) for model in pair)
    assert torch.equal(fast.sequences, plain.sequences)
    for ours, expected in zip(fast.logits, plain.logits, strict=True):
        assert (ours - expected).abs().max() <= 1e-5 * (expected.max() - expected.min())


def prompts_of(num_rows):
    torch.manual_seed(0)
    return prompts(num_rows)


def test_fast_decoding_is_used_in_generate_and_only_there(pair, monkeypatch):
    import loraplex.layers.lora_linear as linear

    calls = []
    real = linear.gated_linear_native
    monkeypatch.setattr(
        linear, "gated_linear_native", lambda *args, **options: calls.append(1) or real(*args, **options)
    )
    fast, plain = pair
    ids, mask = prompts(2)
    plain.generate(ids, mask, adapters=["a", None], max_new_tokens=3, do_sample=False)
    fast(ids, mask, adapters=["a", None])
    fast(ids[:, :1], mask[:, :1], adapters=["a", None])
    assert calls == []
    fast.generate(ids, mask, adapters=["a", None], max_new_tokens=3, do_sample=False)
    assert len(calls) > 0


def test_a_row_decodes_to_the_same_bits_whatever_its_neighbours_use(pair):
    fast, _ = pair
    ids, mask = prompts(3)
    one = fast.generate(ids, mask, adapters=["a", None, None], **OPTIONS)
    other = fast.generate(ids, mask, adapters=["a", "a", "a:-1"], **OPTIONS)
    for a, b in zip(one.logits, other.logits, strict=True):
        assert torch.equal(a[0], b[0])


def test_base_model_is_as_it_was_after_detaching():
    base, untouched = tiny_model("llama"), tiny_model("llama")
    keys = list(base.state_dict())
    model = MultiLoraModel(base)
    assert any(isinstance(module, LoraLinear) for module in base.modules())
    assert list(base.state_dict()) == keys
    model.adaptable.detach()
    assert [type(m) for m in base.modules()] == [type(m) for m in untouched.modules()]
    ids, mask = prompts(2)
    assert torch.equal(base(ids, attention_mask=mask).logits, untouched(ids, attention_mask=mask).logits)


def test_a_float16_model_generates_with_torch(tmp_path):
    model = MultiLoraModel(tiny_model("llama", dtype=torch.float16))
    ids, mask = prompts(2)
    assert model.generate(ids, mask, max_new_tokens=2, do_sample=False).shape == (2, 9)
