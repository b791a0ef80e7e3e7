"""How long do later requests wait for their first token, when they share a long prefix with an earlier one?

python benchmarks/engine_prefix.py          # a prefix of 1,000 tokens, 16 requests, one after the other and at once
"""

import argparse
import random
import statistics
import time

from common import print_table, save
from random_adapters import random_adapter

from loraplex import MultiLoraModel
from loraplex.engine.config import EngineConfig
from loraplex.engine.engine import Engine
from loraplex.engine.request import Request
from loraplex.engine.sampling import SamplingParams


def first_token_s(engine: Engine, requests: list[Request]) -> list[float]:
    """Seconds to the first token of requests that come at once, in their order."""
    start = time.perf_counter()
    ids = [engine.add_request(request) for request in requests]
    seconds: dict[str, float] = {}
    while engine.has_work:
        for delta in engine.step():
            seconds.setdefault(delta.request_id, time.perf_counter() - start)
            if delta.finish_reason is not None:
                engine.pop_result(delta.request_id)
    return [seconds[request_id] for request_id in ids]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prefix-tokens", type=int, default=1000)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-save", action="store_true")
    options = parser.parse_args()
    model = MultiLoraModel.from_pretrained(options.model, dtype=options.dtype)
    model.load_adapter("adapter", random_adapter(model.adaptable.shapes, 8, model.dtype, seed=0))
    draw = random.Random(0)
    rows = []
    with Engine(model, EngineConfig()) as engine:
        for _ in range(options.rounds):
            prefix = [draw.randrange(1000, 40000) for _ in range(options.prefix_tokens)]
            tails = [[draw.randrange(1000, 40000) for _ in range(8)] for _ in range(options.requests)]
            sampling = SamplingParams(max_tokens=1)
            requests = [Request(prefix + tail, adapters="adapter", sampling=sampling) for tail in tails]
            engine.clear_prefix_cache()
            apart = [first_token_s(engine, [request])[0] for request in requests]
            engine.clear_prefix_cache()
            at_once = first_token_s(engine, requests)
            rows.append({"first": apart[0], "later": statistics.median(apart[1:]), "last_at_once": max(at_once)})
    medians = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    results = medians | {"later_of_first": medians["later"] / medians["first"]}
    print_table(
        f"{options.requests} requests that share {options.prefix_tokens} tokens: seconds to the first token",
        ["first", "later ones", "ratio", "all at once, last"],
        [[f"{results[key]:.3f}" for key in ("first", "later", "later_of_first", "last_at_once")]],
    )
    if not options.no_save:
        save("engine_prefix", vars(options), results)


if __name__ == "__main__":
    main()
