"""Times on a device: CUDA events around each run, the L2 cache flushed before it, medians; and figures beside bars."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

_FLUSHED_BYTES = 256 * 2**20  # several times the L2 cache of an H100


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One line of the table."""

    shape: str
    what: str
    value: float
    unit: str
    bar: str = ""  # as the project states it
    holds: bool | None = None  # None: nothing is asked, or this device isn't the one that it is asked of

    @property
    def text(self) -> str:
        return f"{self.value:.4g} {self.unit}".strip()


class Timer:
    """On a CPU it measures wall-clock times, which say nothing about a GPU: only that the script runs."""

    def __init__(self, device: torch.device, rounds: int) -> None:
        self.device = device
        self._rounds = rounds
        self._flushed = torch.empty(_FLUSHED_BYTES if self.is_gpu else 1, dtype=torch.uint8, device=device)

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    def once(self, run: Callable[[], object], prepare: Callable[[], object] | None = None) -> float:
        """Seconds of one run, without what `prepare` does before it."""
        if prepare is not None:
            prepare()
        if not self.is_gpu:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        self._flushed.zero_()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def median(self, run: Callable[[], object], prepare: Callable[[], object] | None = None) -> float:
        """The median of the seconds that a run takes; `prepare` makes fresh inputs before each."""
        for _ in range(3 if self.is_gpu else 1):
            run()
        return statistics.median(self.once(run, prepare) for _ in range(self._rounds))

    def captured(self, run: Callable[[], object]) -> Callable[[], object]:
        """`run` as a CUDA graph, so that launches cost no host time; on a CPU as it is."""
        if not self.is_gpu:
            return run
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay
