"""Captures and steering of single requests: those of `generate`, in packed passes of all kinds of rows."""

import gc
import weakref

import numpy as np
import pytest

from loraplex import MultiLoraModel
from loraplex.engine.config import EngineConfig
from loraplex.engine.engine import Engine
from loraplex.engine.request import Request
from loraplex.engine.sampling.params import SamplingParams
from loraplex.errors import CapacityError, RequestError
from loraplex.residual.capture import CaptureRequest
from loraplex.residual.registry import AttentionRequest
from loraplex.residual.steering import Steering
from tests.engine.engines import Prompted, add_residuals, answer, assert_same, make_model, prompts, write_adapters

NUM_TOKENS = 7
CONFIG = EngineConfig(cache_bytes=2**22)
CONFIGS = {
    "together": CONFIG,
    "small chunks, small blocks": EngineConfig(cache_bytes=2**22, max_step_tokens=12, block_tokens=4),
    "few blocks": EngineConfig(cache_bytes=14 * 2**13, max_length=60, max_step_tokens=40),
}
CAPTURES = (
    CaptureRequest(),
    CaptureRequest(reduce="mean", layers=(1,)),
    CaptureRequest(queries="generated", heads=(2, 0)),
    CaptureRequest(queries=9),
    None,
)
STEERINGS = (
    (),
    (Steering(spans=((2, 5),), strength=8.0),),
    (Steering(spans=((1, 3), (4, 5)), strength=0, layers=(1,)),),
    (Steering(spans=((0, 4),), strength=0.2, heads=(1, 3)), Steering(spans=((3, 5),), strength=3.0)),
    (Steering(spans=((2, 5),), share=0.6), Steering(spans=((1, 2), (6, 8)), share=0.3, heads=(0, 3), layers=(1,))),
)
CHOICES = ("ra", None, "0+rb:0.5", "science+ra", "science", "f", "1", "v+ra")
PROMPT = tuple(range(20, 60))


@pytest.fixture(scope="module", params=["llama", "mistral", "gemma2"])
def served(request, tmp_path_factory):
    """Prompts with captures and steerings, the answers of `generate`, and what it captured."""
    model = add_residuals(make_model(request.param, write_adapters(request.param, tmp_path_factory.mktemp("adapters"))))
    asked = []
    for i, prompted in enumerate(prompts((9, 30, 17), CHOICES)):
        attention = AttentionRequest(capture=[CAPTURES[i % len(CAPTURES)]], steering=[STEERINGS[i % len(STEERINGS)]])
        asked.append((prompted, attention, answer(model, prompted, NUM_TOKENS, attention)))
    return model, asked


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> MultiLoraModel:
    return add_residuals(make_model("llama", write_adapters("llama", tmp_path_factory.mktemp("llama"))))


def request_of(prompted: Prompted, attention: AttentionRequest) -> Request:
    return prompted.asking(NUM_TOKENS, capture=attention.capture[0], steering=attention.steering[0])


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_answers_and_captures_equal_generates(served, config):
    model, asked = served
    with Engine(model, config) as engine:
        for _ in range(2):  # the second time the prefix cache is warm
            results = engine.generate([request_of(prompted, attention) for prompted, attention, _ in asked])
            for (prompted, attention, tokens), result in zip(asked, results, strict=True):
                again = AttentionRequest(steering=attention.steering)
                assert_same(model, prompted, result, tokens, again)
                expected = attention.captures[0] if attention.captures else None
                assert (result.capture is None) == (expected is None)
                if expected is not None and result.token_ids == tokens:
                    assert_captured(result.capture, expected)
        assert engine.stats().num_blocks_held == 0


def assert_captured(found, expected):
    for field in ("layers", "heads", "query_positions", "key_tokens"):
        assert getattr(found, field) == getattr(expected, field), field
    assert found.weights.shape == expected.weights.shape
    assert np.abs(found.weights - expected.weights).max() <= 1e-5
    assert (found.residual_norms is None) == (expected.residual_norms is None)
    if found.residual_norms is not None:
        assert np.allclose(found.residual_norms, expected.residual_norms, rtol=1e-4, atol=1e-5)


def test_steering_changes_answers_and_lasts_through_generation(model):
    prompted = Prompted(PROMPT, None)
    muted = (Steering(spans=((10, 30),), strength=0),)
    request = prompted.asking(NUM_TOKENS, steering=muted, capture=CaptureRequest(queries="generated"))
    with Engine(model, CONFIG) as engine:
        plain, steered = engine.generate([prompted.asking(NUM_TOKENS), request])
    assert plain.token_ids != steered.token_ids
    assert steered.capture.weights.shape[2] == NUM_TOKENS
    assert steered.capture.weights[..., 10:30].max() == 0
    assert plain.capture is None


@pytest.mark.parametrize("how", [{"strength": 5.0}, {"share": 0.5}])
def test_steered_rows_share_the_prefix_before_their_first_span_and_no_more(model, how):
    steering = (Steering(spans=((20, 24),), **how),)
    with Engine(model, CONFIG) as engine:
        plain = Prompted(PROMPT, None).asking(2)
        engine.generate([plain])
        steered = Prompted(PROMPT, None).asking(NUM_TOKENS, steering=steering)
        assert engine.generate([steered])[0].num_cached_tokens == 16
        result = engine.generate([steered])[0]
        assert result.num_cached_tokens == 32
        attention = AttentionRequest(steering=[steering])
        prompted = Prompted(PROMPT, None)
        assert_same(model, prompted, result, answer(model, prompted, NUM_TOKENS, attention), attention)
        nothing = (Steering(spans=((20, 24),), strength=1.0),)
        assert engine.generate([Prompted(PROMPT, None).asking(2, steering=nothing)])[0].num_cached_tokens == 32


def test_a_capture_runs_the_queries_that_it_wants(model):
    with Engine(model, CONFIG) as engine:
        engine.generate([Prompted(PROMPT, None).asking(2)])
        for queries, num_cached in (("all", 0), (10, 16), (5, 32), ("generated", 32)):
            capture = CaptureRequest(queries=queries)
            result = engine.generate([Prompted(PROMPT, None).asking(2, capture=capture)])[0]
            assert result.num_cached_tokens == num_cached, queries


def test_a_cancelled_request_has_what_it_captured_and_nothing_stays(model):
    with Engine(model, CONFIG) as engine:
        request_id = engine.add_request(Prompted(PROMPT, "ra").asking(50, capture=CaptureRequest()))
        never = engine.add_request(Prompted(PROMPT, "ra").asking(50, capture=CaptureRequest()))
        engine.cancel(never)
        for _ in range(4):
            engine.step()
        buffers = [weakref.ref(sequence.captures.buffer) for sequence in engine._scheduler.running]
        engine.cancel(request_id)
        engine.step()
        result = engine.pop_result(request_id)
        num_run = len(PROMPT) + len(result.token_ids) - 1
        assert result.capture.weights.shape == (2, 4, num_run, num_run)
        assert np.allclose(result.capture.weights.sum(axis=-1), 1, atol=1e-5)
        assert engine.pop_result(never).capture is None
        gc.collect()
        assert [buffer() for buffer in buffers] == [None]


@pytest.mark.parametrize(
    ("asked", "error", "names"),
    [
        ({"capture": CaptureRequest(budget_bytes=1000)}, CapacityError, "budget_bytes is 1000"),
        ({"capture": CaptureRequest(layers=(9,))}, RequestError, r"\[9\]"),
        ({"capture": CaptureRequest(), "sampling": SamplingParams(n=2)}, RequestError, "n=2"),
        ({"capture": "all"}, RequestError, "CaptureRequest"),
        ({"steering": (Steering(spans=((0, 41),), strength=2),)}, RequestError, "not in its prompt"),
        ({"steering": Steering(spans=((0, 4),), strength=2)}, RequestError, "tuple"),
        ({"return_scalings": 1}, RequestError, "return_scalings"),
        ({"scalings_budget_bytes": 0}, RequestError, "scalings_budget_bytes"),
        ({"cache_salt": 5}, RequestError, "cache_salt"),
    ],
)
def test_what_cant_be_served_is_refused_before_anything_runs(model, asked, error, names):
    with Engine(model, CONFIG) as engine:
        with pytest.raises(error, match=names):
            engine.add_request(Request(PROMPT, adapters="ra", **asked))
        assert not engine.has_work


def test_the_first_request_that_asks_joins_the_models_attention(tmp_path):
    model = make_model("llama", write_adapters("llama", tmp_path))
    prompted = Prompted(PROMPT, "0")
    with Engine(model, CONFIG) as engine:
        running = engine.add_request(prompted.asking(NUM_TOKENS))
        engine.step()
        result = engine.generate([prompted.asking(NUM_TOKENS, capture=CaptureRequest())])[0]
        assert result.capture is not None
        assert engine.pop_result(running).token_ids == result.token_ids == answer(model, prompted, NUM_TOKENS)
