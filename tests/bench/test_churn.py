"""The engine endures a churn, and the churn would notice if it didn't."""

import mmap

import pytest

from loraplex.bench import churn
from loraplex.bench.churn import ChurnBench, run_churn
from loraplex.bench.churn_report import ChurnReport, Holdings
from loraplex.engine.engine import Engine
from loraplex.engine.sched.adapter_leases import AdapterLeases
from loraplex.errors import ConfigError
from loraplex.models.multi_lora import MultiLoraModel
from tests.parts import skip_here


def check(report: ChurnReport, num_requests: int) -> None:
    assert report.problems == []
    assert report.finished == num_requests
    assert report.checked > 0.8 * num_requests
    assert report.ties < 0.01 * report.checked
    assert min(report.cancelled, report.refused, report.replaced, report.unloaded) > 0.01 * num_requests


def test_hundreds_of_requests_in_a_churn_are_answered_right_and_leave_nothing():
    check(run_churn(ChurnBench(requests=400)), 400)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_thousand_requests_in_a_churn_are_answered_right_and_leave_nothing():
    check(run_churn(ChurnBench(requests=10_000, seed=1)), 10_000)


def test_same_seed_gives_the_same_churn():
    first, second = (run_churn(ChurnBench(requests=60, seed=5)).as_json() for _ in range(2))
    timed = ("seconds", "memory_began", "memory_ended")
    assert {key: first[key] for key in first if key not in timed} == {
        key: second[key] for key in second if key not in timed
    }


def test_replacement_that_has_no_effect_is_noticed(monkeypatch):
    load_adapter = MultiLoraModel.load_adapter

    def keep_the_old(self, name, source, *, replace=False):
        if not replace:
            load_adapter(self, name, source)

    monkeypatch.setattr(MultiLoraModel, "load_adapter", keep_the_old)
    problems = run_churn(ChurnBench(requests=150)).problems
    assert any("was answered" in problem for problem in problems)


def test_lease_that_is_kept_is_noticed(monkeypatch):
    kept = []
    monkeypatch.setattr(AdapterLeases, "release", lambda self, state: kept.append(state))
    monkeypatch.setattr(churn, "_NUM_SLOTS", 64)
    problems = run_churn(ChurnBench(requests=60)).problems
    assert any("leases are still held" in problem for problem in problems)


def test_wrong_call_that_is_accepted_is_noticed(monkeypatch):
    add_request = Engine.add_request

    def lenient(self, request, request_id=None):
        return add_request(self, request, request_id) if request.prompt else "accepted"

    monkeypatch.setattr(Engine, "add_request", lenient)
    problems = run_churn(ChurnBench(requests=150, disturbances=1.0)).problems
    assert "an empty prompt was not refused" in problems


def test_growth_of_memory_is_a_problem():
    report = ChurnReport()
    report.start_memory()
    if report.memory_began is None:
        skip_here("the memory of a process, which Linux tells")
    # More than earlier tests have left to be given back meanwhile; not from the heap, whose freed blocks are resident.
    with mmap.mmap(-1, 2**28) as held:
        held.write(b"1" * 2**28)
        report.end_memory()
    assert len(report.problems) == 1
    assert "memory grew" in report.problems[0]


def test_what_is_held_is_named():
    before = Holdings(num_adapters=2, num_versions=2, num_leases=0)
    after = Holdings(num_adapters=3, num_versions=5, num_leases=1)
    with Engine(churn.load_model("tiny", "float32")) as engine:
        stats = engine.stats()
    assert before.problems_after(after, stats) == ["1 leases are still held", "2 forgotten versions are still held"]
    assert before.problems_after(before, stats) == []


@pytest.mark.parametrize("option", [{"requests": 0}, {"prompts": 0}, {"disturbances": 1.5}])
def test_churn_that_makes_no_sense_is_refused(option):
    with pytest.raises(ConfigError, match=next(iter(option))):
        ChurnBench(**option)
