"""Where does the time of a decoding step go in the engine? Operators by group, and what Python takes between them.

python benchmarks/step_profile.py                        # 1 and 8 rows, bfloat16: base, one adapter a row, a mixture
python benchmarks/step_profile.py --cases bfloat16:8 --sides base

Milliseconds a step, as torch's profiler sees them on the thread that runs the steps; "between" is the time in which no
operator runs: Python, and the profiler itself, which makes a step longer. "without profiler" is the plain median.
"""

import argparse
import statistics
import time
from collections import Counter

import torch
from common import console, print_table, save
from random_adapters import random_adapter
from torch.profiler import ProfilerActivity, profile

from loraplex import MultiLoraModel, XLoraConfig
from loraplex.engine.config import EngineConfig
from loraplex.engine.engine import Engine
from loraplex.engine.request import Request
from loraplex.engine.sampling.params import SamplingParams

EXPERTS = ("expert0", "expert1", "expert2", "expert3")
SIDES = {"base": None, "rank8": "rank8-{}", "mixture": "mixture"}
GROUPS = {
    "loraplex::decode_layers": "decoder layers in one call",
    "loraplex::gated_linear": "linear and adapters",
    "loraplex::gated_lora_": "linear and adapters",
    "aten::mm": "linear and adapters",
    "aten::addmm": "linear and adapters",
    "loraplex::attend_single_": "attention",
    "loraplex::store_tokens_": "attention",
    "loraplex::rms_norm": "norm, rotary, activation",
    "loraplex::rotate_": "norm, rotary, activation",
    "loraplex::activate_": "norm, rotary, activation",
    "aten::argmax": "choice of tokens",
}
ORDER = (*dict.fromkeys(GROUPS.values()), "other operators", "between", "with profiler", "without profiler")


def make_model(name: str, dtype: str, rows: int) -> MultiLoraModel:
    model = MultiLoraModel.from_pretrained(name, dtype=dtype)
    shapes = model.adaptable.shapes
    names = [f"rank8-{row}" for row in range(rows)] + list(EXPERTS)
    for seed, adapter in enumerate(names):
        model.load_adapter(adapter, random_adapter(shapes, 8, model.dtype, seed=seed))
    model.create_mixture("mixture", EXPERTS, XLoraConfig(layerwise_scalings=True))
    return model


def measure(engine: Engine, side: str, rows: int, options: argparse.Namespace) -> dict[str, float]:
    """Milliseconds a step by group; all rows decode, none ends."""
    named = SIDES[side]
    ids = torch.randint(1000, 40000, (rows, options.prompt_tokens), generator=torch.Generator().manual_seed(0))
    sampling = SamplingParams(max_tokens=4 * options.steps, ignore_eos=True)
    for row, prompt in enumerate(ids.tolist()):
        engine.add_request(Request(prompt, adapters=named and named.format(row), sampling=sampling))
    for _ in range(options.steps // 2):
        engine.step()
    plain = [timed_step(engine) for _ in range(options.steps)]
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        start = time.perf_counter()
        for _ in range(options.steps):
            engine.step()
        profiled = (time.perf_counter() - start) / options.steps * 1e3
    while engine.has_work:
        engine.step()
    totals: Counter[str] = Counter()
    for event in profiler.key_averages():
        totals[GROUPS.get(event.key, "other operators")] += event.self_cpu_time_total / options.steps / 1e3
    totals["between"] = profiled - sum(totals.values())
    return dict(totals) | {"with profiler": profiled, "without profiler": statistics.median(plain)}


def timed_step(engine: Engine) -> float:
    start = time.perf_counter()
    engine.step()
    return (time.perf_counter() - start) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--cases", nargs="+", default=["bfloat16:1", "bfloat16:8"])
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--no-save", action="store_true")
    options = parser.parse_args()
    results = []
    for case in options.cases:
        dtype, rows = case.split(":")
        model = make_model(options.model, dtype, int(rows))
        with Engine(model, EngineConfig(prefix_cache=False)) as engine:
            for side in options.sides:
                groups = measure(engine, side, int(rows), options)
                results.append({"dtype": dtype, "rows": int(rows), "side": side, "ms_per_step": groups})
                console.print(f"{case} {side}: {groups['without profiler']:.1f} ms a step")
    columns = [f"{r['dtype']}, {r['rows']} rows, {r['side']}" for r in results]
    table = [[group, *(f"{r['ms_per_step'].get(group, 0.0):.2f}" for r in results)] for group in ORDER]
    print_table(f"{options.model}: milliseconds of a decoding step", ["group", *columns], table)
    if not options.no_save:
        save("step_profile", vars(options), results)


if __name__ == "__main__":
    main()
