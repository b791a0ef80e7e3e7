"""Modules that packed passes take over: only those that compute what a formula says, and only for an engine's life."""

from collections import Counter

import pytest
import torch

from loraplex import MultiLoraModel
from loraplex.engine.config import EngineConfig
from loraplex.engine.engine import Engine
from loraplex.errors import BaseModelError
from tests.engine.engines import answer, assert_same, prompts
from tests.tiny_models import tiny_model

CONFIG = EngineConfig(cache_bytes=2**22)
needs_compiler = pytest.mark.needs("compiler")
TAKEN = {  # by architecture: norms, gated activations, attention with rotary positions, whole layers
    "llama": {"LlamaRMSNorm": 5, "LlamaMLP": 2, "LlamaAttention": 2, "LlamaDecoderLayer": 2},
    "qwen2": {"Qwen2RMSNorm": 5, "Qwen2MLP": 2, "Qwen2Attention": 2, "Qwen2DecoderLayer": 2},
    "qwen3": {"Qwen3RMSNorm": 9, "Qwen3MLP": 2, "Qwen3Attention": 2, "Qwen3DecoderLayer": 2},
    "gemma2": {"Gemma2RMSNorm": 9, "Gemma2MLP": 2, "Gemma2Attention": 2, "Gemma2DecoderLayer": 2},
    "phi3": {"Phi3RMSNorm": 5, "Phi3DecoderLayer": 2},  # joined projections
    "gpt2": {"GPT2Block": 2},
    "opt": {"OPTDecoderLayer": 2},
}


@needs_compiler
@pytest.mark.parametrize(("name", "taken"), TAKEN.items(), ids=TAKEN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_modules_are_taken_over_by_what_they_compute(name, taken, dtype):
    base = tiny_model(name, dtype=dtype)
    classes = {module: type(module) for module in base.modules()}
    engine = Engine(MultiLoraModel(base), CONFIG)
    changed = Counter(former.__name__ for module, former in classes.items() if type(module) is not former)
    changed.pop("Linear", None)  # LoRA layers
    assert changed == taken
    assert all(isinstance(module, former) for module, former in classes.items())
    engine.close()
    assert not any(type(module) is not former for module, former in classes.items() if former.__name__ in taken)


@needs_compiler
def test_a_norm_that_computes_something_else_is_left_alone():
    base = tiny_model("llama")

    class OddRMSNorm(type(base.model.norm)):
        def forward(self, hidden_states):
            return super().forward(hidden_states) + 0.5

    former = type(base.model.norm)
    base.model.norm.__class__ = OddRMSNorm
    with Engine(MultiLoraModel(base), CONFIG):
        assert type(base.model.norm) is OddRMSNorm
        assert all(type(layer.input_layernorm) is not former for layer in base.model.layers)


@needs_compiler
def test_an_attention_that_computes_something_else_is_given_back():
    base = tiny_model("llama")
    former = type(base.model.layers[0].self_attn)

    class OddAttention(former):
        def forward(self, hidden_states, *args, **kwargs):
            out, weights = former.forward(self, hidden_states, *args, **kwargs)
            return out * 0.5, weights

    for layer in base.model.layers:
        layer.self_attn.__class__ = OddAttention
    model = MultiLoraModel(base)
    prompted = prompts((12,))[0]
    with Engine(model, CONFIG) as engine:
        assert all(type(layer.self_attn) is OddAttention for layer in base.model.layers)
        assert_same(model, prompted, engine.generate([prompted.request(max_tokens=6)])[0], answer(model, prompted, 6))


def test_a_model_whose_tokens_meet_outside_of_attention_is_refused():
    base = tiny_model("llama")
    attention, kinds = base.config._attn_implementation, [type(module) for module in base.modules()]
    base.model.layers[0].register_forward_hook(lambda module, args, out: out + out.mean(dim=1, keepdim=True))
    with pytest.raises(BaseModelError, match=r"LlamaDecoderLayer .* mixes the tokens"):
        Engine(MultiLoraModel(base, fast_decode=False), CONFIG)
    assert base.config._attn_implementation == attention
    assert [type(module) for module in base.modules()] == kinds
