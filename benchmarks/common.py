"""What the benchmark scripts share; most of it is in the package, for `loraplex bench`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loraplex.bench.measures import alternate, medians
from loraplex.bench.report import console, environment, print_table, save_json

__all__ = ["RESULTS", "alternate", "console", "environment", "medians", "print_table", "save"]
RESULTS = Path(__file__).parent / "results"


def save(name: str, workload: Mapping[str, Any], results: Any) -> Path:
    """Write benchmarks/results/NAME.json."""
    path = RESULTS / f"{name}.json"
    save_json(path, workload, results)
    return path
