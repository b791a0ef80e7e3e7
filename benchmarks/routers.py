"""What a mixture in one pass costs in the engine: against base rows, and against one adapter of the same total rank.

    python benchmarks/routers.py                       # 1 and 8 rows, bfloat16, some minutes
    python benchmarks/routers.py --cases float32:8 --kinds arrow

Milliseconds of a decoding step, the same engine and prompts for every side: nothing (base), one adapter of rank 32, the
four experts of rank 8 as a link, and their mixtures by kind of router, on all 7 targets. Sides take turns, round by
round; a ratio is taken within a round, and then the median over the rounds. On a busy machine `--clock cpu` counts the
process's own time, with one thread (OMP_NUM_THREADS=1).
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping

import torch
from common import alternate, medians, print_table, save
from random_adapters import random_adapter

from loraplex import (
    ArrowConfig,
    Engine,
    EngineConfig,
    LinearRouterConfig,
    MultiLoraModel,
    Request,
    SamplingParams,
    SpectrConfig,
    StaticRouterConfig,
)
from loraplex.routers.config import RouterConfig

RANK = 8
EXPERTS = ("expert0", "expert1", "expert2", "expert3")
KINDS: Mapping[str, RouterConfig] = {
    "arrow": ArrowConfig(top_k=2),
    "spectr": SpectrConfig(top_k=2),
    "linear": LinearRouterConfig(top_k=2),
    "static": StaticRouterConfig(gates=(0.4, 0.3, 0.2, 0.1)),
}
ONE, LINK = "one adapter", "link"
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def make_model(name: str, dtype: str) -> MultiLoraModel:
    model = MultiLoraModel.from_pretrained(name, dtype=dtype)
    shapes = model.adaptable.shapes
    for seed, expert in enumerate(EXPERTS):
        model.load_adapter(expert, random_adapter(shapes, RANK, model.dtype, seed=seed))
    model.load_adapter("wide", random_adapter(shapes, RANK * len(EXPERTS), model.dtype, seed=len(EXPERTS)))
    for kind, config in KINDS.items():
        model.create_mixture(kind, EXPERTS, config)
    return model


def step_time(engine: Engine, choice: str | None, rows: int, options: argparse.Namespace) -> Callable[[], float]:
    """What measures the median milliseconds of a step in which all rows decode."""
    ids = torch.randint(1000, 40000, (rows, options.prompt_tokens), generator=torch.Generator().manual_seed(0))
    sampling = SamplingParams(max_tokens=options.steps + options.warm_steps + 2, ignore_eos=True)

    clock = CLOCKS[options.clock]

    def run() -> float:
        for prompt in ids.tolist():
            engine.add_request(Request(prompt, adapters=choice, sampling=sampling))
        times = []
        for step in range(options.warm_steps + options.steps):
            start = clock()
            engine.step()
            if step >= options.warm_steps:
                times.append((clock() - start) * 1e3)
        while engine.has_work:
            engine.step()
        return statistics.median(times)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--cases", nargs="+", default=["bfloat16:1", "bfloat16:8"], help="dtype:rows")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--warm-steps", type=int, default=4, help="the prompts' step and others that aren't timed")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--no-save", action="store_true")
    options = parser.parse_args()
    choices = {"base": None, ONE: "wide", LINK: "+".join(EXPERTS), **{kind: kind for kind in options.kinds}}
    results = []
    for case in options.cases:
        dtype, rows = case.split(":")
        model = make_model(options.model, dtype)
        with Engine(model, EngineConfig(prefix_cache=False)) as engine:
            sides = {side: step_time(engine, choice, int(rows), options) for side, choice in choices.items()}
            figures = alternate(sides, options.rounds)
        of = {
            under: {
                side: statistics.median(a / b for a, b in zip(figures[under], figures[side], strict=True))
                for side in choices
            }
            for under in ("base", ONE)
        }
        times = medians(figures)
        results.append({"dtype": dtype, "rows": int(rows), "step_ms": times, "of_base": of["base"], "of_one": of[ONE]})
        print_table(
            f"{dtype}, {rows} rows",
            ["side", "ms a step", "of base", f"of {ONE}"],
            [[s, f"{times[s]:.2f}", f"{of['base'][s]:.2f}", f"{of[ONE][s]:.2f}"] for s in choices],
        )
    if not options.no_save:
        settings = {key: value for key, value in vars(options).items() if key != "no_save"}
        save("routers", settings | {"experts": len(EXPERTS), "rank": RANK, "targets": "all 7"}, results)


if __name__ == "__main__":
    main()
