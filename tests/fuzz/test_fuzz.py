"""Whatever a file, a setting or a request holds: a typed error or an answer, at once, within bounds, and no trace."""

import pytest

from tests.fuzz.cases import Fuzzer


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> Fuzzer:
    return Fuzzer(tmp_path_factory.mktemp("fuzz"), tmp_path_factory.mktemp("kept"))


def run(fuzzer: Fuzzer, first: int, count: int) -> None:
    failures = [failure for seed in range(first, first + count) if (failure := fuzzer.run(seed)) is not None]
    assert not failures, f"{len(failures)} of {count} cases failed:\n" + "\n".join(failures[:10])


def test_500_damaged_inputs(fuzzer: Fuzzer) -> None:
    run(fuzzer, 0, 500)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_10_000_damaged_inputs(fuzzer: Fuzzer) -> None:
    run(fuzzer, 1000, 10_000)
