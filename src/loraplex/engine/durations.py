"""How long something took, counted in classes: what a histogram shows."""

from bisect import bisect_left
from dataclasses import dataclass, field

BOUNDS_S = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


@dataclass
class Durations:
    """One thread adds; whoever reads a copy sees counts that are right to within what is being added."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS_S) + 1))  # by class; the last has no bound
    total_s: float = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(BOUNDS_S, seconds)] += 1
        self.total_s += seconds

    def copy(self) -> "Durations":
        return Durations(counts=list(self.counts), total_s=self.total_s)
