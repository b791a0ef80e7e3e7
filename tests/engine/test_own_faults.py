"""What fails in one request's own work ends that request: the others go on, and the engine isn't restarted."""

from collections.abc import Callable

import pytest

from loraplex import MultiLoraModel
from loraplex.engine.config import EngineConfig
from loraplex.engine.engine import Engine
from loraplex.engine.request import Request
from loraplex.engine.sampling.detokenizer import Detokenizer
from loraplex.engine.sampling.params import SamplingParams
from loraplex.engine.sampling.sampler import Sampler
from loraplex.engine.sched.captures import Captures
from loraplex.engine.sched.request_adapters import RequestAdapters
from loraplex.engine.sched.scaling_pass import SequenceScalingPass
from loraplex.engine.sched.sequence import SequenceState
from loraplex.errors import EngineError
from loraplex.residual.capture import CaptureRequest
from tests.engine.engines import make_model, write_adapters
from tests.training.tiny_jobs import tiny_tokenizer

CONFIG = EngineConfig(cache_bytes=2**21)
SAMPLED = SamplingParams(max_tokens=4, temperature=1.0, seed=3, logprobs=1)
REQUESTS = {
    "plain": Request([9, 10, 11], sampling=SAMPLED),
    "link": Request([12, 13, 14], adapters="0:0.5+2:0.7", sampling=SAMPLED),
    "mixture": Request([15, 16, 17, 18], adapters="science", sampling=SAMPLED, return_scalings=True),
    "capture": Request([19, 20, 21], adapters="1", sampling=SAMPLED, capture=CaptureRequest()),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> MultiLoraModel:
    model = make_model("llama", write_adapters("llama", tmp_path_factory.mktemp("llama")))
    model.__dict__["tokenizer"] = tiny_tokenizer()
    return model


def fail_nth(monkeypatch: pytest.MonkeyPatch, kind: type, method: str, nth: int) -> None:
    """Raise at the nth call of a method."""
    original: Callable[..., object] = getattr(kind, method)
    calls = iter(range(1, 10**9))

    def wrapped(*args: object, **options: object) -> object:
        if next(calls) == nth:
            raise ZeroDivisionError(f"{kind.__name__}.{method}")
        return original(*args, **options)

    monkeypatch.setattr(kind, method, wrapped)


@pytest.mark.parametrize("nth", [1, 3])
@pytest.mark.parametrize(
    ("kind", "method"),
    [
        (Sampler, "choose"),
        (Sampler, "took"),
        (Detokenizer, "add"),
        (Detokenizer, "end"),
        (Captures, "saw"),
        (Captures, "step_scalings"),
        (Captures, "capture"),
        (RequestAdapters, "main_routes"),
        (RequestAdapters, "main_keys"),
        (RequestAdapters, "_bind_mixtures"),
        (SequenceState, "completion"),
        (SequenceScalingPass, "took"),
        (SequenceScalingPass, "settle"),
    ],
)
def test_own_work_that_fails_ends_one_request(model, monkeypatch, kind, method, nth):
    with Engine(model, CONFIG) as engine:
        expected = engine.generate(list(REQUESTS.values()))
        engine.clear_prefix_cache()
        nth = nth if method not in ("capture", "settle") else 1
        fail_nth(monkeypatch, kind, method, nth)
        results = engine.generate(list(REQUESTS.values()))
        failed = [result for result in results if result.finish_reason == "error"]
        assert len(failed) == 1
        assert isinstance(failed[0].error, EngineError)
        assert f"{kind.__name__}.{method}" in str(failed[0].error)
        for result, right in zip(results, expected, strict=True):
            assert result in failed or result.token_ids == right.token_ids
        assert engine.faults.count == 0
        stats = engine.stats()
        assert (stats.num_blocks_held, stats.num_passes) == (0, 0)
        assert all(state.num_leases == 0 for state in model.adapters())


class BrokenConstraint:
    """Breaks where it is told to."""

    is_complete = False

    def __init__(self, place: str) -> None:
        self._place = place

    def allow(self, logits: object) -> None:
        if self._place == "allow":
            raise ValueError("no token is allowed")

    def take(self, token: int) -> None:
        if self._place == "take":
            raise ValueError("no such token")


@pytest.mark.parametrize("place", ["allow", "take"])
def test_a_constraint_that_fails_ends_its_request(model, monkeypatch, place):
    monkeypatch.setattr(
        "loraplex.engine.frontend.input_processor.constraint_of", lambda *given, **options: BrokenConstraint(place)
    )
    bound = Request([9, 10], sampling=SamplingParams(max_tokens=4, json_schema={"type": "object"}))
    with Engine(model, CONFIG) as engine:
        failed, other = engine.generate([bound, REQUESTS["plain"]])
        assert (failed.finish_reason, other.finish_reason) == ("error", "length")
        assert "token" in str(failed.error)
        assert engine.faults.count == 0
