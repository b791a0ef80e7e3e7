"""What a request may need at most, and waiting that comes to an end."""

from pathlib import Path

import pytest

from loraplex import MultiLoraModel
from loraplex.engine.config import EngineConfig
from loraplex.engine.engine import Engine
from loraplex.engine.request import Request
from loraplex.engine.sampling.params import SamplingParams
from loraplex.errors import CapacityError, RequestError, TooLargeError
from tests.engine.engines import answer, assert_same, make_model, prompts, write_adapters
from tests.tiny_models import VOCAB_SIZE
from tests.training.tiny_jobs import tiny_tokenizer

CONFIG = EngineConfig(cache_bytes=2**21)
PROMPT = [9, 10, 11]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_adapters("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def sizes(folders: dict[str, Path]) -> dict[str, int]:
    return {state.name: state.num_bytes for state in make_model("llama", folders, mixtures=False).adapters()}


@pytest.mark.parametrize("choice", ["0+1+2", "science", "science:0.5+0", "alora+science"])
def test_links_of_more_adapters_than_slots_are_refused_when_they_are_added(folders, choice):
    model = make_model("llama", folders, num_slots=2)
    with Engine(model, CONFIG) as engine:
        with pytest.raises(TooLargeError, match="2 slots"):
            engine.add_request(Request(PROMPT, adapters=choice))
        assert not engine.has_work
        for fitting in ("0+1", "second", "second+2"):
            assert engine.generate([Request(PROMPT, adapters=fitting)])[0].finish_reason == "length"


@pytest.mark.parametrize("option", ["slot_bytes", "host_bytes"])
def test_links_larger_than_a_tier_are_refused_when_they_are_added(folders, sizes, option):
    budget = sum(sizes.values()) if option == "host_bytes" else sizes["0"] + sizes["2"]
    model = make_model("llama", folders, mixtures=False, **{option: budget})
    if option == "host_bytes":
        object.__setattr__(model.store.config, "host_bytes", sizes["0"] + sizes["2"])
    with Engine(model, CONFIG) as engine:
        assert engine.generate([Request(PROMPT, adapters="0+2")])[0].finish_reason == "length"
        with pytest.raises(TooLargeError, match=option):
            engine.add_request(Request(PROMPT, adapters="0+2+1"))


def test_a_link_that_pinned_adapters_leave_no_room_is_told_while_others_run(folders):
    """Not at its adding: they may be unpinned. But it doesn't wait for the others, whose end changes nothing."""
    model = make_model("llama", folders, mixtures=False, num_slots=2)
    model.pin("1")
    with Engine(model, CONFIG) as engine:
        engine.add_request(Request(PROMPT, adapters="1", sampling=SamplingParams(max_tokens=50)))
        engine.step()
        request_id = engine.add_request(Request(PROMPT, adapters="0+2"))
        engine.step()
        result = engine.pop_result(request_id)
        assert isinstance(result.error, CapacityError)
        assert not isinstance(result.error, TooLargeError)
        model.pin("1", False)


def test_a_link_gets_its_slots_however_many_come_after_it(folders):
    """Requests for another adapter overlap without a gap: its slot is never free by itself."""
    model = make_model("llama", folders, mixtures=False, num_slots=2)
    later = Request(PROMPT, adapters="2", sampling=SamplingParams(max_tokens=5))
    with Engine(model, CONFIG) as engine:
        engine.add_request(later)
        engine.step()
        waiting = engine.add_request(Request(PROMPT, adapters="0+1", sampling=SamplingParams(max_tokens=2)))
        for _ in range(200):
            engine.add_request(later)  # one of them always runs
            engine.step()
            result = engine.pop_result(waiting)
            if result is not None:
                break
        assert result is not None, "it was passed over for ever"
        assert result.finish_reason == "length"


@pytest.mark.parametrize(("n", "length", "max_tokens"), [(3, 3, 60), (4, 20, 100)])
def test_answers_of_one_request_give_way_to_each_other(folders, n, length, max_tokens):
    """All are as old and as important as the others; the blocks suffice for some of them."""
    model = make_model("llama", folders, mixtures=False)
    request = Request(
        list(range(1, 1 + length)), sampling=SamplingParams(max_tokens=max_tokens, n=n, temperature=1.0, seed=1)
    )
    with Engine(model, CONFIG) as engine:
        (expected,) = engine.generate([request])
    with Engine(model, EngineConfig(cache_bytes=8 * 2**13, max_length=128)) as engine:
        assert engine.stats().num_blocks == 8
        request_id = engine.add_request(request)
        for _ in range(1000):
            engine.step()
            if not engine.has_work:
                break
        assert not engine.has_work, "no answer gives way"
        result = engine.pop_result(request_id)
        assert [c.token_ids for c in result.completions] == [c.token_ids for c in expected.completions]


def test_more_answers_than_ever_wait_are_refused(folders):
    model = make_model("llama", folders, mixtures=False)
    with Engine(model, EngineConfig(cache_bytes=2**21, max_running=2, max_waiting=3)) as engine:
        with pytest.raises(TooLargeError, match="n is 6"):
            engine.add_request(Request(PROMPT, sampling=SamplingParams(n=6)))
        (result,) = engine.generate([Request(PROMPT, sampling=SamplingParams(n=5, max_tokens=2))])
        assert len(result.completions) == 5


def test_a_model_that_no_longer_runs_is_a_fault_and_no_requests_own(folders, monkeypatch):
    """As on a device that has failed: every pass raises, also one of a single token."""
    model = make_model("llama", folders, mixtures=False)
    asked = prompts((12,))[:3]
    with Engine(model, CONFIG) as engine:
        runner = engine._runner

        def broken(*given: object) -> None:
            raise RuntimeError("the device has failed")

        monkeypatch.setattr(runner, "forward", broken)
        results = engine.generate([prompted.request(max_tokens=4) for prompted in asked])
        assert {result.finish_reason for result in results} == {"error"}
        assert engine.faults.count == 1
        for prompted, result in zip(asked, engine.generate([p.request(max_tokens=4) for p in asked]), strict=True):
            assert_same(model, prompted, result, answer(model, prompted, 4))


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: Request(PROMPT, sampling=SamplingParams(logprobs=VOCAB_SIZE + 1)), "logprobs is 129"),
        (lambda: Request(PROMPT, sampling=SamplingParams(prompt_logprobs=VOCAB_SIZE + 1)), "prompt_logprobs is 129"),
        (lambda: Request(PROMPT, priority="x"), "priority"),
        (lambda: Request(PROMPT, priority=True), "priority"),
        (lambda: Request(PROMPT, sampling={"n": 2}), "sampling"),
        (lambda: Request("\ud800"), "surrogate"),
        (lambda: Request([{"role": "user", "content": "a\udfffb"}]), "surrogate"),
        (lambda: Request([{"content": "x"}]), "chat template"),
        (lambda: Request(PROMPT, cache_salt=5), "cache_salt"),
        (lambda: Request(PROMPT, scalings_budget_bytes=True), "scalings_budget_bytes"),
        (lambda: Request(PROMPT, adapters=[("0", 10**400)]), "weight"),
        (lambda: Request(PROMPT, adapters="0:1e300"), "weight"),
        (lambda: Request(PROMPT, sampling=SamplingParams(stop=5)), "stop"),
        (lambda: Request(PROMPT, sampling=SamplingParams(stop_token_ids=5)), "stop_token_ids"),
        (lambda: Request(PROMPT, sampling=SamplingParams(logit_bias=[(1, 2)])), "logit_bias"),
        (lambda: Request(PROMPT, sampling=SamplingParams(logit_bias={1: 10**400})), "logit_bias"),
        (lambda: Request(PROMPT, sampling=SamplingParams(temperature=10**400)), "temperature"),
        (lambda: Request(PROMPT, sampling=SamplingParams(json_schema={"a": object()})), "json_schema"),
    ],
)
def test_what_cant_be_read_is_refused_when_it_is_added(folders, make, names):
    model = MultiLoraModel(make_model("llama", folders, mixtures=False).base)
    model.load_adapter("0", folders["0"])
    model.__dict__["tokenizer"] = tiny_tokenizer()
    with Engine(model, CONFIG) as engine:
        with pytest.raises(RequestError, match=names):
            engine.add_request(make())
        assert not engine.has_work
        (result,) = engine.generate([Request(PROMPT, sampling=SamplingParams(logprobs=VOCAB_SIZE, max_tokens=1))])
        assert len(result.logprobs[0].top) == VOCAB_SIZE
