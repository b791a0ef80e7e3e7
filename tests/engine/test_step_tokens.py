"""How many tokens a pass has is told by passes of this machine."""

from types import SimpleNamespace
from typing import Any

import pytest

from loraplex.engine.startup import step_tokens


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ({64: 500, 128: 900, 256: 1000, 512: 1030, 1024: 1050, 2048: 1050}, 256),
        ({64: 500, 128: 900, 256: 700, 512: 1500, 1024: 1600, 2048: 1600}, 512),  # one of them was disturbed
        ({64: 100, 128: 90, 256: 95, 512: 1e9}, 64),  # two that bring nothing end the search
        ({64: 100, 128: 1e9}, 64),  # a pass of more than half a second ends it too
    ],
)
def test_the_fewest_tokens_at_nearly_the_best_speed(
    monkeypatch: pytest.MonkeyPatch, rates: dict[int, float], expected: int
) -> None:
    monkeypatch.setattr(step_tokens, "_pass_seconds", lambda _, tokens: tokens / rates[tokens])
    runner: Any = SimpleNamespace(max_length=10_000)
    assert step_tokens._measure(runner) == expected


def test_a_model_of_short_sequences_ends_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_tokens, "_pass_seconds", lambda _, tokens: 0.01)
    runner: Any = SimpleNamespace(max_length=300)
    assert step_tokens._measure(runner) == 256
