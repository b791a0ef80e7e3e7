"""Up to how many keys prompts go through the compiled layers is told by passes of this machine."""

from typing import Any

import pytest

from loraplex.engine.startup import chunk_keys
from loraplex.kernels.tuning import ALL_TOKENS


class Runner:
    """One whose compiled passes take a time for each key, and others one for each token and call."""

    def __init__(self, seconds_a_key: float, seconds_a_call: float, max_length: int = 10_000) -> None:
        self.key, self.call, self.max_length = seconds_a_key, seconds_a_call, max_length
        self.limit = -1

    def limit_chunk_keys(self, limit: int) -> None:
        self.limit = limit

    def seconds(self, tokens: int) -> float:
        keys = tokens * (tokens + 1) // 2
        return self.key * keys if keys <= self.limit else self.call


@pytest.mark.parametrize(
    ("runner", "expected"),
    [
        (Runner(3e-6, 10e-3), 64 * 65 // 2),  # 128 tokens see 8,256 keys, for which the calls take less
        (Runner(3e-6, 30e-3), 128 * 129 // 2),
        (Runner(1e-9, 10e-3), ALL_TOKENS),
        (Runner(1e-3, 10e-3), 0),
        (Runner(1e-6, 0.6), 16 * 17 // 2),  # a pass of more than half a second ends the search
        (Runner(3e-6, 10e-3, max_length=40), 32 * 33 // 2),
    ],
)
def test_the_longest_prompt_that_is_faster_in_one_call(
    monkeypatch: pytest.MonkeyPatch, runner: Any, expected: int
) -> None:
    monkeypatch.setattr(chunk_keys, "fastest_pass", lambda runner, tokens: runner.seconds(tokens))
    assert chunk_keys._measure(runner) == expected
