"""Run steps one after the other; what is done stays done, also after kill -9."""

import fcntl
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from threading import Event

from examples.science.steps import Step

REPOSITORY = Path(__file__).resolve().parents[2]


class StepFailedError(RuntimeError):
    """A step's process ended with another status than 0."""


def marker(output: Path, step: Step) -> Path:
    return output / "done" / f"{step.name}.json"


def fingerprint(step: Step) -> str:
    return hashlib.sha256(json.dumps(step.arguments).encode()).hexdigest()[:16]


def is_done(output: Path, step: Step) -> bool:
    """Whether this step, with these arguments, has ended well."""
    path = marker(output, step)
    return path.exists() and json.loads(path.read_text())["arguments"] == fingerprint(step)


def share_done(output: Path, step: Step) -> float:
    """0 to 1; of a training that was stopped, by its log."""
    if is_done(output, step):
        return 1.0
    if step.log is None or not step.log.exists():
        return 0.0
    lines = step.log.read_text("utf-8").splitlines()
    numbers = [json.loads(line).get("step", 0) for line in lines if line.endswith("}")]
    return min(1.0, max(numbers, default=0) / max(1, step.num_steps))


@contextmanager
def alone(output: Path) -> Iterator[None]:
    """Raise StepFailedError if another process runs steps there; its lock ends with it, however it ends."""
    output.mkdir(parents=True, exist_ok=True)
    with (output / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StepFailedError(
                f"another process is at work in {output}. Wait for it, or give another output."
            ) from None
        yield


def run(output: Path, steps: Sequence[Step], *, again: bool = False, processes: int = 1) -> None:
    """Run the steps that aren't done; with `again` the others too.

    `processes`: of neighbours that need nothing of each other, how many at a time; they share the processors.
    Raises StepFailedError at the first that fails; the next run begins with it.
    """
    with alone(output):
        left = [step for step in steps if again or not is_done(output, step)]
        for _, together in groupby(left, key=lambda step: step.needs_no_neighbour or step.name):
            failed = Event()  # set by the thread that sees it: the pool would begin the next step at once
            with ThreadPoolExecutor(max_workers=processes) as pool:
                running = [pool.submit(_run_step, output, step, processes, failed) for step in together]
            for each in running:
                each.result()


def _run_step(output: Path, step: Step, processes: int, failed: Event) -> None:
    if failed.is_set():
        return
    print(f"== {step.name}, some {step.seconds / 60:.0f} min", flush=True)
    began = time.monotonic()
    environment = _environment(processes if step.needs_no_neighbour else 1)
    status = subprocess.run([sys.executable, "-m", *step.arguments], env=environment, check=False).returncode
    if status != 0:
        failed.set()
        raise StepFailedError(
            f"{step.name} ended with status {status}. What it said is above; run the same command to go on. "
            f"It ran: python -m {' '.join(step.arguments)}"
        )
    _mark(output, step, time.monotonic() - began)


def _environment(processes: int) -> dict[str, str]:
    """The step finds this clone's examples from any folder; several processes share the processors."""
    known = os.environ.get("PYTHONPATH", "")
    own = {"PYTHONPATH": os.pathsep.join(filter(None, (str(REPOSITORY), known)))}
    if processes > 1:
        own["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // processes))
    return os.environ | own


def _mark(output: Path, step: Step, seconds: float) -> None:
    path = marker(output, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"arguments": fingerprint(step), "seconds": round(seconds, 1)}) + "\n")
    with part.open() as file:
        os.fsync(file.fileno())
    part.replace(path)
