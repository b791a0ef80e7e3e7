"""How fast is the engine: against transformers' generate, with adapters, and with mixtures, at several batch sizes?

python benchmarks/engine.py                 # all cases
python benchmarks/engine.py --cases bfloat16:8 --rounds 2 --no-save

A case is dtype:rows. Sides: transformers' generate of the plain base model; the engine without adapters, with one
adapter a row (ranks 4 to 32, 7 targets), with one of rank 8 a row, and with one mixture of four experts for all rows.
Tokens/s are those of decoding: a run of `--new-tokens` less one of a single token.
"""

import argparse
import time
from collections.abc import Callable

import torch
from common import alternate, console, medians, print_table, save
from random_adapters import random_adapter

from loraplex import MultiLoraModel, XLoraConfig
from loraplex.engine.config import EngineConfig
from loraplex.engine.engine import Engine
from loraplex.engine.request import Request
from loraplex.engine.sampling import SamplingParams
from loraplex.models.loading import load_base_model
from loraplex.routing.choice import RowChoice

RANKS = (8, 16, 4, 32, 8, 8, 8, 8)
EXPERTS = ("expert0", "expert1", "expert2", "expert3")
SIDES = ("generate", "base", "adapters", "rank8", "mixture")


def make_model(name: str, dtype: str, rows: int) -> MultiLoraModel:
    """A base model with an adapter of mixed ranks and one of rank 8 for each row, and a mixture of four experts."""
    model = MultiLoraModel.from_pretrained(name, dtype=dtype)
    shapes = model.adaptable.shapes
    for row in range(rows):
        model.load_adapter(f"mixed{row}", random_adapter(shapes, RANKS[row % len(RANKS)], model.dtype, seed=row))
        model.load_adapter(f"rank8-{row}", random_adapter(shapes, 8, model.dtype, seed=1000 + row))
    for seed, expert in enumerate(EXPERTS):
        model.load_adapter(expert, random_adapter(shapes, 8, model.dtype, seed=2000 + seed))
    model.create_mixture("mixture", EXPERTS, XLoraConfig(layerwise_scalings=True))
    return model


def choices(side: str, rows: int) -> list[RowChoice]:
    """What each row of a side goes through."""
    named = {"base": None, "adapters": "mixed{}", "rank8": "rank8-{}", "mixture": "mixture"}[side]
    return [None if named is None else named.format(row) for row in range(rows)]


def decoding_speed(run: Callable[[int], None], rows: int, new_tokens: int) -> float:
    """Tokens/s beyond the first of each row."""
    start = time.perf_counter()
    run(1)
    middle = time.perf_counter()
    run(new_tokens)
    seconds = (time.perf_counter() - middle) - (middle - start)
    return rows * (new_tokens - 1) / seconds


def measure(model_name: str, dtype: str, rows: int, options: argparse.Namespace) -> dict[str, float]:
    """Medians of tokens/s of all sides, alternating in one process."""
    plain, _ = load_base_model(model_name, dtype=dtype)
    model = make_model(model_name, dtype, rows)
    ids = torch.randint(1000, 40000, (rows, options.prompt_tokens), generator=torch.Generator().manual_seed(0))

    def run_generate(new_tokens: int) -> None:
        lengths = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens}
        plain.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **lengths)

    with Engine(model, EngineConfig(max_running=max(32, rows), prefix_cache=False)) as engine:

        def run_engine(side: str, new_tokens: int) -> None:
            sampling = SamplingParams(max_tokens=new_tokens, ignore_eos=True)
            rows_choices = choices(side, rows)
            prompts = zip(ids.tolist(), rows_choices, strict=True)
            results = engine.generate([Request(p, adapters=choice, sampling=sampling) for p, choice in prompts])
            assert all(len(result.token_ids) == new_tokens for result in results)

        sides = {side: (lambda n, side=side: run_engine(side, n)) for side in SIDES[1:]} | {"generate": run_generate}
        timed = {
            side: (lambda side=side: decoding_speed(sides[side], rows, options.new_tokens)) for side in options.sides
        }
        return medians(alternate(timed, options.rounds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--cases", nargs="+", default=["bfloat16:1", "bfloat16:8", "float32:8", "bfloat16:32"])
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=65)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-save", action="store_true")
    options = parser.parse_args()
    results = []
    for case in options.cases:
        dtype, rows = case.split(":")
        console.print(f"{rows} rows, {dtype} ...")
        speeds = measure(options.model, dtype, int(rows), options)
        results.append({"dtype": dtype, "rows": int(rows), "tokens_per_s": speeds})
        console.print(", ".join(f"{side} {speed:.0f}" for side, speed in speeds.items()) + " tokens/s")
    print_table(
        f"{options.model}: decoding, tokens/s",
        ["case", *options.sides],
        [[f"{r['dtype']}, {r['rows']} rows", *(f"{r['tokens_per_s'][s]:.0f}" for s in options.sides)] for r in results],
    )
    if not options.no_save:
        save("engine", vars(options) | {"ranks": RANKS, "experts": len(EXPERTS), "targets": "all 7"}, results)


if __name__ == "__main__":
    main()
