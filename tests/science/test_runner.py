"""Steps run once, in their order, and what is left runs after any end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from examples.science.runner import StepFailedError, alone, is_done, marker, run, share_done
from examples.science.steps import Step

STEP = """
import pathlib, sys, time
log = pathlib.Path(sys.argv[1])
log.write_text(log.read_text() + sys.argv[2] + "\\n" if log.exists() else sys.argv[2] + "\\n")
time.sleep(float(sys.argv[3]))
sys.exit(int(sys.argv[4]))
"""


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "a_step.py").write_text(STEP)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    return tmp_path / "log"


def step(log: Path, name: str, sleep: float = 0, status: int = 0, free: bool = False) -> Step:
    arguments = ("a_step", str(log), name, str(sleep), str(status))
    return Step(name=name, arguments=arguments, seconds=1, needs_no_neighbour=free)


def test_steps_run_once_and_again_with_other_arguments(log: Path, tmp_path: Path) -> None:
    run(tmp_path, [step(log, "one"), step(log, "two")])
    run(tmp_path, [step(log, "one"), step(log, "two", sleep=0.01)])
    assert log.read_text().split() == ["one", "two", "two"]
    run(tmp_path, [step(log, "one")], again=True)
    assert log.read_text().split() == ["one", "two", "two", "one"]


def test_a_failed_step_stops_the_run_and_is_the_first_of_the_next(log: Path, tmp_path: Path) -> None:
    with pytest.raises(StepFailedError, match="two ended with status 3"):
        run(tmp_path, [step(log, "one"), step(log, "two", status=3), step(log, "three")])
    run(tmp_path, [step(log, "one"), step(log, "two"), step(log, "three")])
    assert log.read_text().split() == ["one", "two", "two", "three"]


def test_a_killed_run_goes_on_with_the_step_that_it_was_at(log: Path, tmp_path: Path) -> None:
    code = (
        "from pathlib import Path\nfrom tests.science.test_runner import step\n"
        "from examples.science.runner import run\n"
        f"log = Path({str(log)!r}); run(log.parent, [step(log, 'one'), step(log, 'two', sleep=60), step(log, 'three')])"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2], start_new_session=True)
    while not (log.exists() and "two" in log.read_text()):
        assert process.poll() is None, "the run ended by itself"
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    first = step(log, "one")
    assert is_done(tmp_path, first)
    run(tmp_path, [first, step(log, "two"), step(log, "three")])
    assert log.read_text().split() == ["one", "two", "two", "three"]


def test_neighbours_that_need_nothing_of_each_other_run_side_by_side(log: Path, tmp_path: Path) -> None:
    slow, quick = step(log, "slow", sleep=2, free=True), step(log, "quick", sleep=0.5, free=True)
    run(tmp_path, [slow, quick, step(log, "last")], processes=2)
    times = [marker(tmp_path, each).stat().st_mtime for each in (quick, slow, step(log, "last"))]
    assert times == sorted(times), "the quick one waited for the slow one, or the last did not"
    steps = [step(log, "fails", status=3, free=True), step(log, "goes on", sleep=1, free=True), step(log, "after")]
    with pytest.raises(StepFailedError, match="fails ended with status 3"):
        run(tmp_path, steps, processes=2)
    assert [is_done(tmp_path, each) for each in steps] == [False, True, False]


@pytest.mark.parametrize("processes", [1, 2])
def test_nothing_begins_after_a_failed_step(log: Path, tmp_path: Path, processes: int) -> None:
    steps = [step(log, "fails", status=3, free=True)]
    steps += [step(log, f"waits {number}", sleep=1.5, free=True) for number in range(3)]
    with pytest.raises(StepFailedError, match="fails ended with status 3"):
        run(tmp_path, steps, processes=processes)
    assert sum(is_done(tmp_path, each) for each in steps) == processes - 1


def test_two_runs_in_one_folder_are_refused(tmp_path: Path) -> None:
    with alone(tmp_path), pytest.raises(StepFailedError, match="another process"), alone(tmp_path):
        pass


def test_progress_of_a_training_is_read_from_its_log(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1, "loss": 2.0}\n{"step": 5, "eval_loss": 1.0}\n{"step": 6, "lo')
    training = Step(name="train", arguments=("none",), seconds=1, log=log, num_steps=20)
    assert share_done(tmp_path, training) == 0.25
