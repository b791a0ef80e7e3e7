"""Faults of the engine itself, driven by hand: what is told and given back, when it starts anew, when it stops."""

import gc
import logging
import subprocess
import sys
import weakref

import pytest

from loraplex import MultiLoraModel
from loraplex.engine.config import EngineConfig
from loraplex.engine.engine import Engine
from loraplex.engine.faults import FaultLog
from loraplex.engine.progress import Bar
from loraplex.engine.request import Request
from loraplex.engine.sampling.params import SamplingParams
from loraplex.engine.sched.request_tracker import RequestTracker
from loraplex.engine.sched.scheduler import Scheduler
from loraplex.errors import ConfigError, EngineError, EngineStoppedError, RequestError, TooLargeError
from tests.engine.engines import answer, assert_same, make_model, prompts, write_adapters

CONFIG = EngineConfig(cache_bytes=2**21)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> MultiLoraModel:
    return make_model("llama", write_adapters("llama", tmp_path_factory.mktemp("llama")))


@pytest.fixture
def fails_at(monkeypatch: pytest.MonkeyPatch):
    """Let Scheduler.plan raise at these of its calls."""
    plan, calls = Scheduler.plan, []

    def set_up(*numbers: int, error: BaseException | None = None) -> None:
        def failing(scheduler: Scheduler) -> list:
            calls.append(None)
            if len(calls) in numbers:
                raise error or ZeroDivisionError("a scheduler that fails")
            return plan(scheduler)

        monkeypatch.setattr(Scheduler, "plan", failing)

    return set_up


def assert_nothing_held(engine: Engine, model: MultiLoraModel) -> None:
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_blocks_held, stats.num_passes) == (0, 0, 0, 0)
    assert all(state.num_leases == 0 for state in model.adapters())
    assert not engine.has_work
    assert engine._tracker._results == {}


def test_a_fault_ends_all_requests_and_the_next_ones_are_right(model, fails_at):
    asked = prompts((12, 5))
    fails_at(3)
    with Engine(model, CONFIG) as engine:
        results = engine.generate([prompted.request(max_tokens=6) for prompted in asked])
        assert {result.finish_reason for result in results} == {"error"}
        for result in results:
            assert isinstance(result.error, EngineError)
            assert "a scheduler that fails" in str(result.error)
        assert engine.faults.count == 1
        assert_nothing_held(engine, model)
        for prompted, result in zip(asked, engine.generate([p.request(max_tokens=6) for p in asked]), strict=True):
            assert_same(model, prompted, result, answer(model, prompted, 6))
        assert_nothing_held(engine, model)


def test_a_request_that_ended_before_the_fault_keeps_its_result(model, fails_at):
    fails_at(4)
    with Engine(model, CONFIG) as engine:
        short = engine.add_request(Request([9, 10], sampling=SamplingParams(max_tokens=2)))
        long = engine.add_request(Request([9, 11], sampling=SamplingParams(max_tokens=20)))
        deltas = []
        while engine.has_work:
            deltas += engine.step()
        assert engine.pop_result(short).finish_reason == "length"
        assert engine.pop_result(long).finish_reason == "error"
        assert [(d.request_id, d.finish_reason) for d in deltas if d.finish_reason] == [
            (short, "length"),
            (long, "error"),
        ]


def test_what_ended_in_the_failing_step_is_told_as_failed(model, monkeypatch):
    """Its deltas are lost with the step, so its result must not say that it is whole."""
    finish = RequestTracker.finish

    def failing(tracker: RequestTracker, *given: object) -> object:
        ended = finish(tracker, *given)
        raise ZeroDivisionError("just after an answer had ended")
        return ended

    with Engine(model, CONFIG) as engine:
        request_id = engine.add_request(Request([9, 10], sampling=SamplingParams(max_tokens=2, n=2)))
        engine.step()
        monkeypatch.setattr(RequestTracker, "finish", failing)
        deltas = []
        while engine.has_work:
            deltas += engine.step()
        monkeypatch.undo()
        result = engine.pop_result(request_id)
        assert {completion.finish_reason for completion in result.completions} == {"error"}
        assert sorted((d.index, d.finish_reason) for d in deltas if d.finish_reason) == [(0, "error"), (1, "error")]
        assert_nothing_held(engine, model)


def test_results_of_failed_requests_hold_nothing_of_the_old_engine(model, fails_at, monkeypatch):
    monkeypatch.setattr(logging.getLogger("loraplex.engine.engine"), "disabled", True)  # pytest keeps what is logged
    fails_at(2)
    with Engine(model, CONFIG) as engine:
        old = weakref.ref(engine._runner.cache)
        results = engine.generate([Request([9, 10], adapters="0")])
        gc.collect()
        assert old() is None
        assert results[0].error.__cause__ is not None


def test_an_interrupt_leaves_nothing_behind(model, fails_at):
    fails_at(3, error=KeyboardInterrupt())
    with Engine(model, CONFIG) as engine:
        with pytest.raises(KeyboardInterrupt):
            engine.generate([prompted.request(max_tokens=6) for prompted in prompts((12, 5))])
        assert engine.faults.count == 0
        assert_nothing_held(engine, model)
        assert engine.generate([Request([9, 10])])[0].finish_reason == "length"


def test_an_error_of_the_caller_leaves_nothing_behind(model, monkeypatch):
    """Of the progress bar, for example: its output is a closed pipe."""

    def broken(*given: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(Bar, "update", broken)
    with Engine(model, CONFIG) as engine:
        with pytest.raises(BrokenPipeError):
            engine.generate([prompted.request(max_tokens=6) for prompted in prompts((12, 5))])
        assert engine.faults.count == 0
        assert_nothing_held(engine, model)


def test_an_engine_that_fails_too_often_stops_for_good(model, fails_at):
    config = EngineConfig(cache_bytes=2**21, max_restarts=2)
    frozen, implementation = gc.get_freeze_count(), model.base.config._attn_implementation
    fails_at(*range(1, 10))
    with Engine(model, config) as engine:
        for _ in range(3):
            assert engine.generate([Request([9, 10], adapters="0")])[0].finish_reason == "error"
        with pytest.raises(EngineStoppedError, match=r"3 faults.*a scheduler that fails"):
            engine.generate([Request([9, 10])])
        with pytest.raises(EngineStoppedError):
            engine.add_request(Request([9, 10]))
        assert engine.step() == []
        assert_nothing_held(engine, model)
        assert (gc.get_freeze_count(), model.base.config._attn_implementation) == (frozen, implementation)


def test_an_engine_that_cant_start_anew_stops(model, fails_at, monkeypatch):
    fails_at(1)
    with Engine(model, CONFIG) as engine:
        assert engine.generate([Request([9, 10])])[0].finish_reason == "error"

        def broken(*given: object) -> None:
            raise MemoryError("no room for keys and values")

        monkeypatch.setattr("loraplex.engine.core.start_model_runner", broken)
        for _ in range(3):
            result = engine.generate([Request([9, 10])])[0]
            assert "no room for keys and values" in str(result.error)
        with pytest.raises(EngineStoppedError, match="MemoryError"):
            engine.generate([Request([9, 10])])


def test_old_faults_are_forgiven():
    now = [0.0]
    log = FaultLog(EngineConfig(max_restarts=1, restart_window_s=10), lambda: now[0])
    for _ in range(5):
        log.add(ValueError("x"))
        assert not log.has_stopped
        now[0] += 10
    log.add(ValueError("x"))
    now[0] += 9
    log.add(ValueError("x"))
    assert log.has_stopped


@pytest.mark.parametrize(
    "option", [{"on_fault": "ignore"}, {"max_restarts": -1}, {"max_restarts": True}, {"restart_window_s": 0}]
)
def test_wrong_settings_are_refused(option):
    with pytest.raises(ConfigError, match=next(iter(option))):
        EngineConfig(**option)


def test_ids_are_never_taken_twice(model):
    with Engine(model, CONFIG) as engine:
        engine.add_request(Request([9, 10]), "request-0")
        with pytest.raises(RequestError, match="in use"):
            engine.add_request(Request([9, 10]), "request-0")
        assert engine.add_request(Request([9, 10])) == "request-1"


def test_more_requests_than_it_ever_takes_are_no_full_queue(model):
    with (
        Engine(model, EngineConfig(cache_bytes=2**21, max_waiting=2, max_running=2)) as engine,
        pytest.raises(TooLargeError, match="5 requests"),
    ):
        engine.generate([Request([9, 10])] * 5)


_EXITS = """
import asyncio
from loraplex import AsyncEngine, EngineConfig, MultiLoraModel, Request
from loraplex.engine.sched.scheduler import Scheduler
from tests.tiny_models import tiny_model

def failing(scheduler):
    raise ZeroDivisionError("a scheduler that fails")

async def main():
    engine = AsyncEngine(MultiLoraModel(tiny_model("llama")), EngineConfig(cache_bytes=2**21, on_fault="exit"))
    Scheduler.plan = failing
    result = await engine.generate(Request([9, 10]))
    print(result.finish_reason, flush=True)
    await asyncio.sleep(100)

asyncio.run(main())
"""


def test_the_process_ends_where_that_is_wanted():
    ended = subprocess.run([sys.executable, "-c", _EXITS], capture_output=True, text=True, timeout=200)
    assert (ended.returncode, ended.stdout.strip()) == (70, "error"), ended.stderr
    assert "a scheduler that fails" in ended.stderr
