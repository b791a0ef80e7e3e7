"""Models that keep a state for each sequence beside keys and values: right in any batch, or refused by type."""

import numpy as np
import pytest
import torch

from loraplex import MultiLoraModel, XLoraConfig
from loraplex.engine.config import EngineConfig
from loraplex.engine.engine import Engine
from loraplex.errors import BaseModelError, CapacityError, ConfigError
from loraplex.residual.capture import CaptureRequest
from loraplex.residual.registry import AttentionRequest
from loraplex.residual.steering import Steering
from tests.architectures.variants import make_model
from tests.engine.engines import add_residuals, answer, assert_same, prompts
from tests.engine.hybrids import (
    CHOICES,
    HYBRIDS,
    REFUSED,
    Hybrid,
    assert_greedy,
    logprobs_alone,
    make_hybrid,
    tight_config,
)

LENGTHS = (3, 57, 17, 30, 24, 1, 41, 9)
FAST = ("lfm2", "qwen3_next")
MODELS = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in HYBRIDS]


@pytest.fixture(scope="module")
def lfm2(tmp_path_factory) -> Hybrid:
    hybrid = make_hybrid("lfm2", tmp_path_factory.mktemp("lfm2"))
    for name in ("third", "fourth", "fifth"):
        hybrid.model.create_mixture(name, ["0", "1"], XLoraConfig(scaling_pass_value=0.5), seed=2)
    return hybrid


@pytest.mark.parametrize("name", MODELS)
def test_a_mixed_batch_gives_what_each_request_gets_alone(name, tmp_path):
    hybrid = make_hybrid(name, tmp_path)
    asked = prompts(LENGTHS, CHOICES)
    config = tight_config(hybrid.model, num_sequences=6, num_blocks=18, max_step_tokens=24, fair_tokens=16)
    kinds = [type(module) for module in hybrid.model.base.modules()]
    with Engine(hybrid.model, config) as engine:
        ids = []
        for i, prompted in enumerate(asked):
            ids.append(engine.add_request(prompted.request(max_tokens=8, n=1 + i % 2)))
            engine.step()
            engine.step()
        while engine.has_work:
            engine.step()
        results = [engine.pop_result(request_id) for request_id in ids]
        stats = engine.stats()
    assert stats.num_preempted > 0, "some must give way and be computed again"
    assert (stats.num_blocks_held, stats.num_passes) == (0, 0)
    assert [type(module) for module in hybrid.model.base.modules()] == kinds
    for prompted, result in zip(asked, results, strict=True):
        assert_greedy(hybrid, prompted, result)


@pytest.mark.parametrize("name", MODELS)
def test_in_bfloat16_log_probabilities_are_as_near_to_float32_as_alone(name):
    base, exact = make_model(name).to(torch.bfloat16), make_model(name).to(torch.bfloat16).float()
    asked = prompts(LENGTHS, (None,) * len(LENGTHS))
    with Engine(MultiLoraModel(base), EngineConfig(cache_bytes=2**22, max_step_tokens=24)) as engine:
        results = engine.generate([prompted.request(max_tokens=8, logprobs=0) for prompted in asked])
    ours, alone = [], []
    for prompted, result in zip(asked, results, strict=True):
        expected = logprobs_alone(exact, prompted.prompt, result.token_ids)
        ours.append(torch.tensor([chosen.logprob for chosen in result.logprobs]) - expected)
        alone.append(logprobs_alone(base, prompted.prompt, result.token_ids) - expected)
    noise = torch.cat(alone).square().mean().sqrt()
    assert torch.cat(ours).square().mean().sqrt() <= 3 * noise, "further from float32 than rounding takes it"


def test_residuals_captures_and_steering_go_on_as_they_are(lfm2):
    add_residuals(lfm2.model)
    choices = ("ra", "rb:0.5+ra", "0+ra:0.5", "v", None)
    capture, steering = CaptureRequest(), (Steering(spans=((2, 5),), strength=4.0),)
    with Engine(lfm2.model, EngineConfig(cache_bytes=2**20, max_step_tokens=16)) as engine:
        asked = prompts((21, 9, 30), choices)
        results = engine.generate([prompted.asking(6, capture=capture, steering=steering) for prompted in asked])
    for prompted, result in zip(asked, results, strict=True):
        attention = AttentionRequest(capture=[capture], steering=[steering])
        expected = answer(lfm2.model, prompted, 6, attention)
        assert_same(lfm2.model, prompted, result, expected, AttentionRequest(steering=[steering]))
        assert np.abs(result.capture.weights - attention.captures[0].weights).max() <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", REFUSED)
def test_states_of_other_forms_are_refused_by_type_in_every_dtype(name, dtype):
    base = make_model(name).to(dtype)
    model = MultiLoraModel(base, fast_decode=False)
    kinds = [type(module) for module in base.modules()]
    with pytest.raises(BaseModelError, match=f"(?s){REFUSED[name]}.*MultiLoraModel.generate"):
        Engine(model, EngineConfig(cache_bytes=2**22))
    assert [type(module) for module in base.modules()] == kinds


def test_a_pass_that_fails_leaves_states_as_they_were(lfm2):
    asked = prompts((9, 12), (None, "0"))
    last = lfm2.model.base.model.layers[-1]  # all states before it are computed when it fails
    failures = [RuntimeError("once")]

    def fail(module, args):
        if failures and engine.stats().counts.num_steps >= 3:
            raise failures.pop()

    with Engine(lfm2.model, EngineConfig(cache_bytes=2**20)) as engine:
        handle = last.register_forward_pre_hook(fail)
        results = engine.generate([prompted.request(max_tokens=8) for prompted in asked])
    handle.remove()
    assert not failures
    for prompted, result in zip(asked, results, strict=True):
        assert_greedy(lfm2, prompted, result)


def test_states_are_not_taken_from_the_prefix_cache_nor_drafted(lfm2):
    prompted = prompts((40,), ("science",))[0]
    with Engine(lfm2.model, EngineConfig(cache_bytes=2**20, block_tokens=8)) as engine:
        results = [engine.generate([prompted.request(max_tokens=8)])[0] for _ in range(2)]
        assert engine.stats().counts.num_drafted == 0
    assert [result.num_cached_tokens for result in results] == [0, 0]
    for result in results:
        assert_greedy(lfm2, prompted, result)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("forgotten", ["conv", "recurrent"])
def test_a_state_that_is_not_read_by_several_tokens_is_refused(forgotten, dtype):
    base = make_model("qwen3_next").to(dtype)
    former = type(base.model.layers[0].linear_attn)

    class Forgetful(former):
        def forward(self, hidden_states, cache_params=None, **kwargs):
            if cache_params is not None and hidden_states.shape[1] > 1:
                layer = cache_params.layers[self.layer_idx]
                for states in (layer.conv_states, layer.recurrent_states)[forgotten == "recurrent"].values():
                    if states is not None:
                        states.zero_()
            return former.forward(self, hidden_states, cache_params=cache_params, **kwargs)

    for layer in base.model.layers:
        if hasattr(layer, "linear_attn"):
            layer.linear_attn.__class__ = Forgetful
    with pytest.raises(BaseModelError, match=f"Forgetful doesn't read its {forgotten} state"):
        Engine(MultiLoraModel(base), EngineConfig(cache_bytes=2**22))


def test_memory_for_states_is_part_of_the_cache_and_bounds_the_passes(lfm2):
    track_bytes = 2 * 64 * 3 * 4  # layers, hidden size, tokens of the convolution, float32
    with pytest.raises(ConfigError, match=f"keeps {track_bytes} bytes"):
        Engine(lfm2.model, EngineConfig(cache_bytes=7 * track_bytes))
    with Engine(lfm2.model, EngineConfig(cache_bytes=2**20, max_running=2)) as engine:
        fits, too_many = prompts((9,), ("second+third+fourth", "second+third+fourth+fifth"))
        with pytest.raises(CapacityError, match="states of 5 passes, but there is room for 4"):
            engine.add_request(too_many.request(max_tokens=4))
        assert_greedy(lfm2, fits, engine.generate([fits.request(max_tokens=4)])[0])


def test_two_engines_share_one_hybrid_model(lfm2):
    kinds = [type(module) for module in lfm2.model.base.modules()]
    asked = prompts((9, 12), (None, "0"))
    first = Engine(lfm2.model, EngineConfig(cache_bytes=2**20))
    second = Engine(lfm2.model, EngineConfig(cache_bytes=2**20))
    ids = [(engine, engine.add_request(p.request(max_tokens=8))) for engine in (first, second) for p in asked]
    for _ in range(3):
        first.step()
        second.step()
    first.close()
    while second.has_work:
        second.step()
    for (engine, request_id), prompted in zip(ids, asked * 2, strict=True):
        if engine is second:
            assert_greedy(lfm2, prompted, second.pop_result(request_id))
    second.close()
    assert [type(module) for module in lfm2.model.base.modules()] == kinds
