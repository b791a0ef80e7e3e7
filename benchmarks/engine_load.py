"""Do a thousand registered adapters slow the engine down, when requests for them come at random?

python benchmarks/engine_load.py            # 1,000 adapters, Zipf 1.0, 10 minutes at 70 % of capacity; 5 GB of files
python benchmarks/engine_load.py --adapters 60 --seconds 20 --no-save

Requests arrive in a Poisson stream, whatever the engine is doing (open loop). Their rate is a share of the capacity
that eight resident adapters reach; the same stream then runs with those eight, and with all adapters under Zipf.
"""

import argparse
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import console, print_table, save
from random_adapters import write_random_folders

from loraplex import MultiLoraModel, StoreConfig
from loraplex.engine.config import EngineConfig
from loraplex.engine.engine import Engine
from loraplex.engine.request import Request
from loraplex.engine.sampling import SamplingParams

RANKS = (8, 16, 4, 32)


@dataclass
class Load:
    """What one stream of requests met."""

    first_token_s: list[float] = field(default_factory=list)
    num_tokens: int = 0
    seconds: float = 0.0

    def report(self) -> dict[str, Any]:
        waits = sorted(self.first_token_s)
        return {
            "tokens_per_s": self.num_tokens / self.seconds,
            "first_token_p50_s": waits[len(waits) // 2],
            "first_token_p99_s": waits[int(len(waits) * 0.99)],
            "requests": len(waits),
        }


def make_request(draw: random.Random, adapter: str, options: argparse.Namespace) -> Request:
    prompt = [draw.randrange(1000, 40000) for _ in range(options.prompt_tokens)]
    sampling = SamplingParams(max_tokens=options.new_tokens, ignore_eos=True)
    return Request(prompt, adapters=adapter, sampling=sampling)


def run_stream(engine: Engine, arrivals: list[tuple[float, Request]]) -> Load:
    """Add every request at its time and step in between; the clock runs on when the engine is behind."""
    load, arrived, left = Load(), {}, list(reversed(arrivals))
    start = time.perf_counter()
    while left or engine.has_work:
        now = time.perf_counter() - start
        while left and left[-1][0] <= now:
            at, request = left.pop()
            arrived[engine.add_request(request)] = at
        if not engine.has_work:
            time.sleep(min(0.01, left[-1][0] - now))
            continue
        for delta in engine.step():
            load.num_tokens += len(delta.token_ids)
            if delta.request_id in arrived and delta.token_ids:
                load.first_token_s.append(time.perf_counter() - start - arrived.pop(delta.request_id))
            if delta.finish_reason is not None:
                assert delta.error is None, delta.error
                engine.pop_result(delta.request_id)
    load.seconds = time.perf_counter() - start
    return load


def poisson(rate: float, seconds: float, seed: int, request: Callable[[random.Random], Request]) -> list:
    draw, at, arrivals = random.Random(seed), 0.0, []
    while (at := at + draw.expovariate(rate)) < seconds:
        arrivals.append((at, request(draw)))
    return arrivals


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--host-adapters", type=int, default=300)
    parser.add_argument("--exponent", type=float, default=1.0)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--share", type=float, default=0.7, help="of the capacity")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--no-save", action="store_true")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    try:
        results = measure(options, folder)
    finally:
        shutil.rmtree(folder)
    columns = ("tokens_per_s", "first_token_p50_s", "first_token_p99_s", "requests")
    rows = [[side, *(f"{results[side][key]:.3g}" for key in columns)] for side in ("eight", "zipf")]
    print_table(f"open loop at {options.share:.0%} of capacity", ["adapters", *columns], rows)
    if not options.no_save:
        save("engine_load", vars(options), results)


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    console.print(f"writing {options.adapters} adapters ...")
    probe = MultiLoraModel.from_pretrained(options.model, dtype=options.dtype)
    ranks = [RANKS[i % len(RANKS)] for i in range(options.adapters)]
    paths = write_random_folders(probe.adaptable.shapes, folder, ranks, probe.dtype)
    mean_bytes = sum(file.stat().st_size for file in folder.rglob("*.safetensors")) // options.adapters
    store = StoreConfig(host_bytes=mean_bytes * options.host_adapters, num_slots=64)
    model = MultiLoraModel.from_pretrained(options.model, dtype=options.dtype, store=store)
    for name, path in paths.items():
        model.load_adapter(name, path)
    names = random.Random(1).sample(sorted(paths), len(paths))
    weights = [1 / (k + 1) ** options.exponent for k in range(len(names))]
    with Engine(model, EngineConfig()) as engine:
        flood = [(0.0, make_request(random.Random(i), names[i % 8], options)) for i in range(96)]
        run_stream(engine, flood[:16])
        capacity = len(flood) / run_stream(engine, flood).seconds
        rate = options.share * capacity
        console.print(f"capacity {capacity:.2f} requests/s; {rate:.2f} requests/s for {options.seconds:.0f} s ...")

        def eight(draw: random.Random) -> Request:
            return make_request(draw, names[draw.randrange(8)], options)

        def zipf(draw: random.Random) -> Request:
            return make_request(draw, draw.choices(names, weights)[0], options)

        loads = {
            side: run_stream(engine, poisson(rate, options.seconds, 2, request))
            for side, request in (("eight", eight), ("zipf", zipf))
        }
    return {side: load.report() for side, load in loads.items()} | {"capacity_requests_per_s": capacity}


if __name__ == "__main__":
    main()
