"""The cases of benchmarks/tool_calls.py, and how it judges answers."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import tool_calls  # type: ignore[import-not-found]

    return tool_calls


def answer(*calls: tuple[str, str]) -> SimpleNamespace:
    functions = [SimpleNamespace(name=name, arguments=arguments) for name, arguments in calls]
    return SimpleNamespace(tool_calls=[SimpleNamespace(function=function) for function in functions])


def test_there_are_a_hundred_cases_whose_right_calls_fit(bench: Any) -> None:
    cases = list(bench.tool_cases())
    assert Counter(case.category for case in cases) == {"simple": 40, "multiple": 30, "parallel": 20, "forced": 10}
    for case in cases:
        for name, arguments in case.calls:
            assert name in {tool["function"]["name"] for tool in case.tools}
            jsonschema.validate(arguments, bench.FUNCTIONS[name]["function"]["parameters"])
        right = answer(*((name, json.dumps(arguments)) for name, arguments in case.calls))
        told = bench.judge(case, right, "tool_calls")
        assert (told["wrong"], told["names_right"], told["all_right"]) == ([], True, True), case


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (("add", '{"a": 1, "b": 2'), "Expecting"),
        (("add", '{"a": 1, "b": -2}'), "minimum"),
        (("add", '{"a": 1}'), "required"),
        (("search", '{"query": "x", "filter": {"year": 2000}}'), "was not offered"),
    ],
)
def test_calls_that_do_not_fit_are_told(bench: Any, call: tuple[str, str], reason: str) -> None:
    case = next(case for case in bench.tool_cases() if case.calls[0][0] == "add" and case.category == "simple")
    told = bench.judge(case, answer(call), "tool_calls")
    assert reason in told["wrong"][0]
    assert bench.summary([told])["all"]["fit"] == 0
    assert bench.summary([bench.judge(case, answer(), "stop")])["all"]["fit"] == 0
