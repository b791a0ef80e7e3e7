"""How long does a model of 1.1B parameters take from its file to the first token?

python benchmarks/startup.py                # and transformers beside it; Linux only

Every measurement is a fresh process, the sides alternate, medians. The file is in the page cache for both: "read" is
a plain read of it, one after the other by a single thread. What a process pays before a model comes, Python and
imports, stands by itself. The first run of loraplex finds no measurements of this machine in its cache folder and makes
them; it is told apart.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

PROMPT_TOKENS = 16
LAYERS = 22


class Clock:
    """Seconds of each phase."""

    def __init__(self, began: float) -> None:
        self.seconds: dict[str, float] = {}
        self._last = began

    def lap(self, name: str) -> None:
        now = time.time()
        self.seconds[name], self._last = now - self._last, now


def measure_loraplex(base: Path, clock: Clock) -> None:
    from loraplex import Engine, MultiLoraModel, Request, SamplingParams

    clock.lap("imports")
    model = MultiLoraModel.from_pretrained(base, dtype="bfloat16")
    clock.lap("load")
    with Engine(model) as engine:
        clock.lap("engine")
        engine.generate([Request(list(range(2, 2 + PROMPT_TOKENS)), sampling=SamplingParams(max_tokens=1))])
        clock.lap("first token")


def measure_transformers(base: Path, clock: Clock) -> None:
    from transformers import AutoModelForCausalLM

    clock.lap("imports")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    clock.lap("load")
    ids = torch.arange(2, 2 + PROMPT_TOKENS)[None]
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False)
    clock.lap("first token")


SIDES: dict[str, Callable[[Path, Clock], None]] = {"loraplex": measure_loraplex, "transformers": measure_transformers}


def measure(side: str, base: Path, cache: Path) -> dict[str, float]:
    """A side's phases and its peak of memory, of a fresh process."""
    began = time.time()
    command = [sys.executable, __file__, "--side", side, "--base", str(base), "--began", str(began)]
    environment = os.environ | {"LORAPLEX_CACHE": str(cache)}
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if run.returncode != 0:
        raise SystemExit(f"the measured process failed:\n{run.stderr}")
    figures: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    return figures


def read_seconds(path: Path) -> float:
    """Of a plain read of a file."""
    block = bytearray(2**24)
    start = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.readinto(block):
            pass
    return time.perf_counter() - start


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-save", action="store_true")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)  # that this process measures
    parser.add_argument("--base", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--began", type=float, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    if options.side is not None:
        clock = Clock(options.began)
        SIDES[options.side](options.base, clock)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps(clock.seconds | {"peak": peak}))
        return
    from common import console, print_table, save  # a measured process imports its own side alone
    from quantized_training import write_bases

    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    reads: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        console.print("writing a random model ...")
        write_bases(Path(folder), options.layers, kinds=("bfloat16",))
        base, cache = Path(folder) / "bfloat16", Path(folder) / "cache"
        first = measure("loraplex", base, cache)
        file_bytes = (base / "model.safetensors").stat().st_size
        for _ in range(options.rounds):
            reads.append(read_seconds(base / "model.safetensors"))
            for side, runs in found.items():
                console.print(f"measuring {side} ...")
                runs.append(measure(side, base, cache))
    results = {
        "file_bytes": file_bytes,
        "read": statistics.median(reads),
        "first_start": first,
        **{
            side: {phase: statistics.median(run[phase] for run in runs) for phase in runs[0]}
            for side, runs in found.items()
        },
    }
    rows = [row(name, results[name], results["read"]) for name in ("first_start", *SIDES)]
    title = f"From file to first token; a plain read of {file_bytes / 2**20:.0f} MiB takes {results['read']:.2f} s"
    print_table(title, ["process", *COLUMNS], rows)
    if not options.no_save:
        workload = {"model": "random Llama of TinyLlama's shape", "layers": options.layers, "rounds": options.rounds}
        console.print(f"saved {save('startup', workload, results)}")


COLUMNS = ("imports", "load", "engine", "first token", "file to token", "of a read", "peak, MiB")


def row(name: str, phases: dict[str, Any], read: float) -> list[str]:
    """A table's line."""
    whole = sum(phases.get(phase, 0.0) for phase in ("load", "engine", "first token"))
    cells = [f"{phases[phase]:.2f}" if phase in phases else "" for phase in COLUMNS[:4]]
    return [name.replace("_", " "), *cells, f"{whole:.2f}", f"{whole / read:.1f}x", f"{phases['peak'] / 2**20:.0f}"]


if __name__ == "__main__":
    main()
