"""One case: an input that is damaged by its seed, read, and judged."""

import random
import shutil
import signal
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from loraplex.errors import LoraplexError
from tests.fuzz.targets import Bench, Target, damage

MAX_SECONDS = 5.0
MAX_GROWTH = 64 << 20  # bytes beyond the files' own


class Hang(BaseException):
    """Reading took too long."""


class Fuzzer:
    """Runs cases on one bench; what fails is kept in a folder, with its seed."""

    def __init__(self, scratch: Path, kept: Path) -> None:
        self._bench = Bench(scratch)
        self._scratch = scratch
        self._kept = kept
        self.targets = self._bench.targets()
        self._whole: dict[str, Path] = {}
        for number, target in enumerate(self.targets):
            folder = self._whole[target.name] = scratch / f"whole-{number}"
            target.write(folder)
            if any(folder.iterdir()):  # as it is, it can be read; requests have no files
                target.read(folder, random.Random(0))

    def run(self, seed: int) -> str | None:
        """Run one case; returns what is wrong, if anything is."""
        draw = random.Random(seed)
        target = self.targets[seed % len(self.targets)]
        folder = self._scratch / "case"
        shutil.copytree(self._whole[target.name], folder)
        try:
            damage(draw, folder)
            size = sum(
                path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file() and not path.is_symlink()
            )
            found = self._judge(target, folder, draw, size)
            if found is not None:
                self._kept.mkdir(parents=True, exist_ok=True)
                kept = self._kept / f"case-{seed}"
                shutil.rmtree(kept, ignore_errors=True)
                folder.rename(kept)
                return f"seed {seed} ({target.name}), kept in {kept}: {found}"
            return None
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _judge(self, target: Target, folder: Path, draw: random.Random, size: int) -> str | None:
        reset_peak()
        before, start, found = peak_bytes(), time.perf_counter(), None
        try:
            with limited(2 * MAX_SECONDS):
                target.read(folder, draw)
        except LoraplexError as error:
            if len(str(error)) > 4000 or not str(error):
                found = f"a message of {len(str(error))} characters"
        except Hang:
            found = "it hangs"
        except Exception:
            found = traceback.format_exc()
        if time.perf_counter() - start > MAX_SECONDS:
            found = found or f"it took {time.perf_counter() - start:.1f} s"
        growth = peak_bytes() - before
        if growth > MAX_GROWTH + size:
            found = found or f"memory grew by {growth >> 20} MiB"
        try:
            self._bench.check_nothing_is_left()
        except AssertionError as error:
            found = found or str(error)
        return found


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise Hang in the main thread after `seconds`."""

    def end(number: int, frame: FrameType | None) -> None:
        raise Hang

    former = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)


def reset_peak() -> None:
    """Let the peak of resident memory start from now, where the kernel allows it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) << 10
