"""A skip for a missing part fails where all parts are required, and one for the machine does not."""

from collections.abc import Callable

import pytest

from tests.parts import PARTS, REQUIRE_ALL, Part

pytest_plugins = ["pytester"]
MISSING = "import pytest\nfrom tests import parts\n"
OF_A_PART = {
    "mark": f'{MISSING}\n@pytest.mark.needs("nothing")\ndef test_of_it(): pass\n',
    "call": f'{MISSING}\ndef test_of_it(): parts.require("nothing")\n',
    "module": f'{MISSING}\nparts.require("nothing")\n\ndef test_of_it(): pass\n',
    "fixture": f'{MISSING}\n@pytest.fixture\ndef it(): parts.require("nothing")\n\ndef test_of_it(it): pass\n',
}
UNNAMED = 'import pytest\n\ndef test_of_it(): pytest.importorskip("no_such_package")\n'
OF_THE_MACHINE = """
import pytest
from tests.parts import skip_here

@pytest.mark.gpu
def test_on_a_device(): skip_here("a CUDA device")

def test_here(): skip_here("a thousand cores")

@pytest.mark.xfail(reason="a fault that is known")
def test_of_a_fault(): assert False
"""


@pytest.fixture
def outcome(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], pytest.RunResult]:
    """Run a file of tests with the hooks of tests/conftest.py, with or without LORAPLEX_REQUIRE_ALL."""

    def run(test: str, required: str) -> pytest.RunResult:
        monkeypatch.setenv(REQUIRE_ALL, required)
        pytester.makeini("[pytest]\nmarkers =\n    needs\n    gpu\n")
        pytester.makepyfile(test)
        return pytester.runpytest_inprocess("-p", "tests.conftest", "-p", "no:cacheprovider", "-rs")

    return run


@pytest.mark.parametrize("test", [*OF_A_PART.values(), UNNAMED], ids=[*OF_A_PART, "not in the list"])
def test_a_missing_part_is_skipped_or_fails_as_asked(outcome, monkeypatch, test) -> None:
    monkeypatch.setitem(PARTS, "nothing", Part(lambda: False, "make nothing"))
    outcome(test, "").assert_outcomes(skipped=1)
    strict = outcome(test, "1")
    assert strict.ret != 0
    assert not strict.parseoutcomes().keys() & {"skipped", "passed"}
    assert f"{REQUIRE_ALL}=1, but Skipped: " in strict.stdout.str()
    assert test == UNNAMED or "needs nothing: make nothing" in strict.stdout.str()


def test_what_the_machine_lacks_stays_a_skip(outcome) -> None:
    strict = outcome(OF_THE_MACHINE, "1")
    assert strict.ret == 0
    strict.assert_outcomes(skipped=2, xfailed=1)


def test_every_part_says_how_to_get_it() -> None:
    assert all(part.how for part in PARTS.values())
