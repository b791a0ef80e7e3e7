"""What an engine tries at start: long passes through a layer of each kind, a few tokens through all layers."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer

from loraplex import Engine, EngineConfig, MultiLoraModel, Request, SamplingParams
from loraplex.engine.startup import start
from loraplex.errors import BaseModelError
from loraplex.layers.base.module_kinds import first_layers
from tests.architectures.variants import ARCHS, kind_of, make_deep_config, make_model

NUM_LAYERS = 6


def make_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    return LlamaForCausalLM(config).eval()


def attends(module) -> bool:
    return isinstance(module, LlamaAttention)


def test_layers_of_one_kind_are_tried_as_two():
    base = make_llama()
    part = first_layers(base, attends)
    assert [len(model.model.layers) for model in (part, base)] == [2, NUM_LAYERS]
    assert [model.config.num_hidden_layers for model in (part, base)] == [2, NUM_LAYERS]
    assert all(ours is theirs for ours, theirs in zip(part.model.layers, base.model.layers, strict=False))
    ids = torch.arange(5)[None]
    states = base.model(ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(part.model(ids).last_hidden_state, base.model.norm(states[2]))


def test_layers_are_tried_up_to_the_last_that_is_of_its_own_kind():
    base = make_llama()
    base.model.layers[4].self_attn.scaling *= 2
    assert len(first_layers(base, attends).model.layers) == 5


def test_a_layer_with_a_forward_of_its_own_is_of_its_own_kind():
    base = make_llama()
    base.model.layers[5].forward = base.model.layers[5].forward
    assert first_layers(base, attends) is base


def test_a_layer_with_a_hook_of_its_own_is_of_its_own_kind():
    base = make_llama()
    base.model.layers[3].mlp.register_forward_hook(lambda module, args, output: output * 2)
    assert len(first_layers(base, attends).model.layers) == 4


class MixingLayer(LlamaDecoderLayer):
    """The last one adds the mean of what it is given: nothing but its number says so."""

    def forward(self, hidden_states, *args, **kwargs):
        made = super().forward(hidden_states, *args, **kwargs)
        return made + hidden_states.mean(dim=1, keepdim=True) if self.self_attn.layer_idx == NUM_LAYERS - 1 else made


def test_a_layer_that_is_other_by_its_number_alone_is_found_with_a_few_tokens():
    base = make_llama()
    for layer in base.model.layers:
        layer.__class__ = MixingLayer
    assert len(first_layers(base, attends).model.layers) == 2
    with pytest.raises(BaseModelError, match=r"model\.layers\.5"):
        Engine(MultiLoraModel(base))


def greedy(engine: Engine) -> tuple[int, ...]:
    sampling = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    return engine.generate([Request([3, 4, 5], sampling=sampling)])[0].token_ids


def test_engines_of_one_model_share_compiled_layers_until_the_last_is_closed():
    base = make_llama()
    own = type(base.model.layers[0])
    model = MultiLoraModel(base)
    first, second = Engine(model), Engine(model)
    taken = type(base.model.layers[0])
    assert taken is not own, "no layer was taken over: the test shows nothing"
    before = greedy(second)
    first.close()
    assert type(base.model.layers[0]) is taken
    assert greedy(second) == before
    second.close()
    assert type(base.model.layers[0]) is own
    with Engine(model) as third:
        assert greedy(third) == before


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ARCHS if kind_of(name) in ("causal", "vlm")])
def test_a_layer_of_each_kind_tells_what_all_layers_tell(name, monkeypatch):
    """The verdict on a model of twice as many layers is the one that all of them give, tried at all positions."""

    def verdict() -> str:
        try:
            with Engine(MultiLoraModel(make_model(name, config=make_deep_config(name))), EngineConfig(max_length=200)):
                return "runs"
        except BaseModelError as error:
            return str(error)

    by_kinds = verdict()
    monkeypatch.setattr(start, "first_layers", lambda base, attends: base)
    assert by_kinds == verdict()
