"""Models whose attention has something beside the usual: each is right, or refused when the engine starts."""

import pytest
import torch
import transformers
from torch import nn

from loraplex import MultiLoraModel
from loraplex.engine.config import EngineConfig
from loraplex.engine.engine import Engine
from loraplex.engine.kv.mask_rule import MaskRule
from loraplex.engine.request import Request
from loraplex.engine.sampling.params import SamplingParams
from loraplex.errors import BaseModelError
from loraplex.kernels.native import native_available
from tests.architectures.variants import W, make_config, make_model
from tests.engine.engines import TIE
from tests.tiny_models import tiny_model

NEW = 10
CONFIG = EngineConfig(cache_bytes=2**22, max_step_tokens=24, block_tokens=8, max_length=200)
DTYPES = [torch.float32, torch.bfloat16]


def _assert_right(base, oracle, lengths=(9, 30, 57)) -> None:
    prompts = [torch.randint(2, 118, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in lengths]
    with Engine(MultiLoraModel(base), CONFIG) as engine:
        results = engine.generate([Request(p, sampling=SamplingParams(max_tokens=NEW, logprobs=1)) for p in prompts])
    for prompt, result in zip(prompts, results, strict=True):
        assert result.error is None
        ids = torch.tensor([prompt])
        options = {"max_new_tokens": NEW, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        out = oracle.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        for place, (ours, theirs) in enumerate(zip(result.token_ids, out.sequences[0, len(prompt) :], strict=True)):
            logits = out.logits[place][0]
            assert result.logprobs[place].logprob == pytest.approx(logits.log_softmax(-1)[ours].item(), abs=2e-3)
            if ours != theirs:
                assert (logits[theirs] - logits[ours]) / (logits.max() - logits.min()) < TIE
                break


def _llama4_without_own_positions():
    """Its attention counts positions by itself, to scale queries; without that scale it is known."""
    config = make_config("llama4_text")
    config.attn_temperature_tuning = False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config).float().eval()


@pytest.mark.parametrize(
    "name",
    [
        *("qwen2_moe", "ministral3", "gpt_oss"),
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("phimoe", "olmo-clip", "afmoe", "mimo_v2_flash", "vlm-gemma3")
        ),
    ],
)
def test_answers_are_those_of_generate(name):
    """Windows that stand in masks alone, query scales by position, sinks, clips, keyword arguments, text of a VLM."""
    _assert_right(make_model(name), make_model(name))


def test_attention_in_chunks_sees_its_own_chunk():
    _assert_right(_llama4_without_own_positions(), _llama4_without_own_positions())


def test_windows_and_chunks_are_read_off_the_masks():
    for base, expected in (
        (make_model("qwen2_moe"), [MaskRule(window=W), MaskRule()]),
        (make_model("phimoe"), [MaskRule(window=W)] * 2),
        (_llama4_without_own_positions(), [MaskRule(chunk=W), MaskRule()] * 2),
    ):
        with Engine(MultiLoraModel(base), CONFIG) as engine:
            assert [shape.terms.mask_rule for shape in engine._runner.cache.shapes.values()] == expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "name", ["doge", "llama4_text", "deepseek_v32", "deepseek_v4", "diffllama", "bloom", "mpt", "falcon-alibi"]
)
def test_what_packed_passes_do_not_know_is_refused_when_the_engine_starts(name, dtype):
    with pytest.raises(BaseModelError):
        Engine(MultiLoraModel(make_model(name).to(dtype)), CONFIG)


# A fault of each kind, put into a model that the engine knows.


def _far_only(module: nn.Module, args, kwargs, output):
    """Changes something from position 100 on."""
    positions = kwargs["position_ids"]
    return output * (1 + 0.3 * (positions >= 100).unsqueeze(-1))


def _long_only(module: nn.Module, args, kwargs, output):
    """Lets the tokens from the 17th on see a mean of all before them, as a model would that keeps such a state."""
    mean = output.cumsum(1) / torch.arange(1, output.shape[1] + 1).view(1, -1, 1)
    return torch.cat([output[:, :W], mean[:, W:].to(output)], dim=1)


def _by_count(module: nn.Module, args, kwargs, output):
    """Counts positions by what a cache has seen."""
    cache = kwargs.get("past_key_values")
    positions = torch.arange(output.shape[1]) + (0 if cache is None else cache.get_seq_length())
    return output * (1 + 0.3 * (positions >= 100)).view(1, -1, 1).to(output)


def _shifted(module: nn.Module, args, kwargs, output):
    return output + 0.5 * output.roll(1, dims=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("fault", "told"),
    [(_long_only, r"model.*rounding"), (_by_count, r"model.*rounding"), (_shifted, "mixes the tokens")],
)
def test_a_fault_in_one_layer_is_seen(fault, told, dtype):
    base = tiny_model("llama", dtype=dtype)
    base.model.layers[1].register_forward_hook(fault, with_kwargs=True)
    with pytest.raises(BaseModelError, match=told):
        Engine(MultiLoraModel(base), EngineConfig(cache_bytes=2**22))


def test_what_depends_on_told_positions_alone_is_right():
    bases = [tiny_model("llama") for _ in range(2)]
    for base in bases:
        base.model.layers[1].register_forward_hook(_far_only, with_kwargs=True)
    _assert_right(bases[0], bases[1], lengths=(9, 95))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "qwen3_moe", "deepseek_v3", "gpt_oss", "jetmoe"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_not_taken_for_a_fault(name, dtype):
    for seed in range(3):
        base = make_model(name, seed=seed).to(dtype)
        Engine(MultiLoraModel(base), EngineConfig(cache_bytes=2**22)).close()


needs_compiler = pytest.mark.skipif(not native_available(), reason="the compiled kernels can't be built here")


def _is_taken(base: nn.Module, path: str) -> bool:
    module = base.get_submodule(path)
    former = type(module)
    with Engine(MultiLoraModel(base), EngineConfig(cache_bytes=2**22)):
        return type(module) is not former


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("path", ["model.layers.0.self_attn", "model.layers.0.mlp", "model.layers.0.input_layernorm"])
def test_what_clips_large_values_is_not_taken_over(path, dtype):
    base = tiny_model("llama", dtype=dtype)
    assert _is_taken(base, path)
    module = base.get_submodule(path)
    former = type(module)

    class Clipping(former):
        def forward(self, hidden_states, *args, **kwargs):
            return former.forward(self, hidden_states.clamp(-40, 40), *args, **kwargs)

    Clipping.__name__, Clipping.__module__ = former.__name__, former.__module__
    module.__class__ = Clipping
    assert not _is_taken(base, path)


@needs_compiler
def test_what_scales_queries_by_position_is_not_taken_over():
    base = tiny_model("llama")
    former = type(base.model.layers[0].self_attn)

    class Scaling(former):
        def forward(self, hidden_states, position_embeddings, *args, position_ids=None, **kwargs):
            cos, sin = position_embeddings
            scale = 1 + 0.1 * (position_ids > 200).unsqueeze(-1)
            return former.forward(self, hidden_states, (cos * scale, sin * scale), *args, **kwargs)

    for layer in base.model.layers:
        layer.self_attn.__class__ = Scaling
    assert not _is_taken(base, "model.layers.0.self_attn")
