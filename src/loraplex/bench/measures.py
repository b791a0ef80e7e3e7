"""Figures from runs: sides that take turns, medians, percentiles, resident memory."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

_STATUS = Path("/proc/self/status")  # Linux


def alternate(
    variants: Mapping[str, Callable[[], float]], rounds: int, *, seconds: float = float("inf")
) -> dict[str, list[float]]:
    """Run every variant once a round, in turn, after one warm-up each: noise of a shared machine hits all alike.

    A round that would not be done after so many `seconds` isn't begun, but for the first.
    """
    start = time.monotonic()
    for run in variants.values():
        run()
    figures: dict[str, list[float]] = {name: [] for name in variants}
    for done in range(rounds):
        passed = time.monotonic() - start
        if done > 0 and passed * (done + 2) / (done + 1) > seconds:
            break
        for name, run in variants.items():
            figures[name].append(run())
    return figures


def medians(figures: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The median of every side."""
    return {name: statistics.median(values) for name, values in figures.items()}


def percentiles(values: Sequence[float], at: Sequence[int] = (50, 90, 99)) -> dict[str, float]:
    """{"p50": ...}, interpolated between neighbours; NaN where there are no values."""
    return {f"p{q}": float(np.percentile(values, q)) if values else float("nan") for q in at}


def resident_bytes() -> int | None:
    """This process's own memory in RAM; None where the system doesn't tell.

    Memory of no file, shared or not. Pages of files are left out: the system takes them back and reads them again as
    it likes, which looks like growth.
    """
    if not _STATUS.exists():
        return None
    fields = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    kibibytes = [int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem") if name in fields]
    return 1024 * sum(kibibytes) if kibibytes else None
