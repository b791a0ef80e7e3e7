"""Does a thousand adapters on disk slow generation down, when host memory holds a hundred and eight have slots?

python benchmarks/zipf.py                   # 1,000 adapters: 5 GB of temporary files, about ten minutes
python benchmarks/zipf.py --adapters 60 --host-adapters 12 --batches 8 --no-save

Rows draw their adapters from a Zipf distribution; the adapters of the next batch are prefetched while the current one
generates. In between, batches of the same prompts run with eight adapters that always stay. What a prefetch has not
finished when its batch ends counts as that batch's time.
"""

import argparse
import random
import shutil
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import console, print_table, save
from random_adapters import write_random_folders

from loraplex import MultiLoraModel, StoreConfig
from loraplex.models.checkpoints.loading import load_base_model

WARM_UP_BATCHES = 60  # adapters only, so that host memory holds what it would after a while
LOADS_TIMED = 30


@dataclass
class Run:
    """What the batches of one side took."""

    seconds: list[float] = field(default_factory=list)
    wait_seconds: list[float] = field(default_factory=list)  # for prefetches, at the end of a batch
    found: Counter[str] = field(default_factory=Counter)  # tiers of a batch's adapters when they were asked for

    def report(self, tokens_per_batch: int) -> dict[str, Any]:
        return {
            "tokens_per_s": tokens_per_batch * len(self.seconds) / sum(self.seconds),
            "median_batch_s": statistics.median(self.seconds),
            "max_batch_s": max(self.seconds),
        }


def draw_batches(names: Sequence[str], exponent: float, rows: int, seed: int) -> Iterator[list[str]]:
    """Batches without end; the adapter of rank k in popularity has weight 1 / k^exponent."""
    draw = random.Random(seed)
    by_popularity = draw.sample(list(names), len(names))
    weights = [1 / (k + 1) ** exponent for k in range(len(names))]
    while True:
        yield draw.choices(by_popularity, weights, k=rows)


def generate(model: MultiLoraModel, ids: torch.Tensor, adapters: list[str], new_tokens: int) -> None:
    tokens = model.generate(
        ids,
        torch.ones_like(ids),
        adapters=adapters,
        do_sample=False,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
    )
    assert tokens.shape == (len(ids), ids.shape[1] + new_tokens), tokens.shape


def run_with_prefetch(
    model: MultiLoraModel, ids: torch.Tensor, batch: list[str], following: list[str], new_tokens: int, run: Run
) -> None:
    """One batch, with the adapters of the following one on their way."""
    start = time.perf_counter()
    tiers = {state.name: state.tier for state in model.adapters()}
    run.found.update(tiers[name] for name in set(following))
    loads = model.store.prefetch(list(set(following)))  # model.prefetch, of which the benchmark waits for the end
    generate(model, ids, batch, new_tokens)
    generated = time.perf_counter()
    wait(loads)
    for load in loads:
        load.result()
    run.seconds.append(time.perf_counter() - start)
    run.wait_seconds.append(time.perf_counter() - generated)


def measure(options: argparse.Namespace, scarce: MultiLoraModel, fixed: MultiLoraModel) -> tuple[Run, Run]:
    """Alternate batches of both sides, after a warm-up of each."""
    batches = draw_batches(scarce.names(), options.exponent, options.rows, seed=0)
    for _ in range(WARM_UP_BATCHES):
        with scarce.store.lease(next(batches)):
            pass
    resident = [fixed.names()[i % len(fixed.names())] for i in range(options.rows)]
    drawn, kept = Run(), Run()
    batch = next(batches)
    for number in range(-1, options.batches):  # the first is a warm-up
        if number == 0:
            drawn, kept = Run(), Run()
        generator = torch.Generator().manual_seed(number + 1)
        ids = torch.randint(1000, 40000, (options.rows, options.prompt_tokens), generator=generator)
        following = next(batches)
        run_with_prefetch(scarce, ids, batch, following, options.new_tokens, drawn)
        start = time.perf_counter()
        generate(fixed, ids, resident, options.new_tokens)
        kept.seconds.append(time.perf_counter() - start)
        batch = following
    return drawn, kept


def load_times(model: MultiLoraModel) -> list[float]:
    """Seconds to bring single adapters from disk (its cache, after they were written) to host memory, while idle."""
    seconds = []
    for state in model.adapters():
        if state.tier == "disk" and len(seconds) < LOADS_TIMED:
            start = time.perf_counter()
            for load in model.store.prefetch([state.name]):
                load.result()
            seconds.append(time.perf_counter() - start)
    return seconds


def make_models(options: argparse.Namespace, folder: Path) -> tuple[MultiLoraModel, MultiLoraModel, dict[str, float]]:
    """The side with all adapters and the side with as many as it has slots, each on a base of its own."""
    base, source = load_base_model(options.model, dtype=options.dtype)
    shapes = MultiLoraModel(load_base_model(source, dtype=options.dtype)[0]).adaptable.shapes
    start = time.perf_counter()
    paths = write_random_folders(shapes, folder, [options.rank] * options.adapters, base.dtype)
    written = time.perf_counter()
    fixed = MultiLoraModel.from_pretrained(source, dtype=options.dtype, store=StoreConfig(num_slots=options.slots))
    for name in list(paths)[: options.slots]:
        fixed.load_adapter(name, paths[name])
    num_bytes = fixed.adapters()[0].num_bytes
    store = StoreConfig(num_slots=options.slots, host_bytes=options.host_adapters * num_bytes)
    scarce = MultiLoraModel(base, source=source, store=store)
    registering = time.perf_counter()
    for name, path in paths.items():
        scarce.load_adapter(name, path)
    times = {
        "write_s": written - start,
        "register_s": time.perf_counter() - registering,
        "adapter_bytes": num_bytes,
    }
    return scarce, fixed, times


def check_disk(options: argparse.Namespace) -> None:
    """Refuse early what would fill the disk: 2 bytes for each of the 305,280 weights of a rank in SmolLM2-135M."""
    needed = options.adapters * options.rank * 305_280 * (4 if options.dtype == "float32" else 2)
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if needed * 1.1 > free:
        raise SystemExit(
            f"{options.adapters} adapters need about {needed / 1e9:.1f} GB in {tempfile.gettempdir()}, which has "
            f"{free / 1e9:.1f} GB free. Set TMPDIR to another disk, or use fewer --adapters."
        )


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--exponent", type=float, default=1.0, help="of the Zipf distribution")
    parser.add_argument("--host-adapters", type=int, default=100, help="how many fit into host memory")
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--batches", type=int, default=60)
    parser.add_argument("--no-save", action="store_true")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    check_disk(options)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        console.print(f"writing and registering {options.adapters} adapters ...")
        scarce, fixed, results = make_models(options, Path(folder))
        console.print(f"{options.batches} batches of each side ...")
        drawn, kept = measure(options, scarce, fixed)
        loads = load_times(scarce)
    tokens = options.rows * options.new_tokens
    found = {tier: drawn.found[tier] / drawn.found.total() for tier in ("slot", "host", "disk")}
    results |= {
        "zipf": drawn.report(tokens) | {"found_in": found, "wait_s": sum(drawn.wait_seconds)},
        "fixed": kept.report(tokens),
        "load_ms": {"median": statistics.median(loads) * 1e3, "max": max(loads) * 1e3} if loads else None,
    }
    results["ratio"] = results["zipf"]["tokens_per_s"] / results["fixed"]["tokens_per_s"]
    print_table(
        f"{options.adapters} adapters (Zipf {options.exponent}) against {options.slots}: {options.rows} rows, "
        f"{options.new_tokens} new tokens",
        ["adapters", "tokens/s", "median batch", "slowest batch"],
        [
            [side, f"{r['tokens_per_s']:.0f}", f"{r['median_batch_s']:.2f} s", f"{r['max_batch_s']:.2f} s"]
            for side, r in (("Zipf", results["zipf"]), ("fixed", results["fixed"]))
        ],
    )
    console.print(
        f"ratio {results['ratio']:.3f}; found in slots {found['slot']:.0%}, in host memory {found['host']:.0%}, "
        f"on disk {found['disk']:.0%}; waited {results['zipf']['wait_s']:.2f} s in all; "
        f"loads {results['load_ms']}"
    )
    if not options.no_save:
        save("zipf", vars(options), results)


if __name__ == "__main__":
    main()
