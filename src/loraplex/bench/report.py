"""What is told about a run: the machine and versions, a table, a file."""

import json
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from loraplex.output_files import whole_file

console = Console()
PACKAGES = ("loraplex", "torch", "transformers", "peft")


def environment() -> dict[str, Any]:
    """Hardware, commit and versions: a number without them means nothing."""
    return {
        "cpu": _cpu_name(),
        "cores": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
        "versions": {name: package_version(name) for name in PACKAGES},
    }


def save_json(path: Path, workload: Mapping[str, Any], results: Any) -> None:
    """Write machine, workload and results."""
    content = {"environment": environment(), "workload": workload, "results": results}
    with whole_file(path, _is_report) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    console.print(f"written to {path}")


def _is_report(path: Path) -> bool:
    with path.open(encoding="utf-8", errors="replace") as file:
        head = file.read(100)
    return head.split()[:2] == ["{", '"environment":']


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str | None = None) -> None:
    """Labels to the left, numbers to the right."""
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def package_version(name: str) -> str:
    """A package's version, or that it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _commit() -> str:
    """Of the clone that this file is in."""
    here = Path(__file__).parent
    try:
        run = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=here)
    except FileNotFoundError:  # no git
        return "unknown"
    return run.stdout.strip() or "unknown"
