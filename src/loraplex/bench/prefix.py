"""How long do later requests wait for their first token, when they share a long prefix with an earlier one?"""

import random
import statistics
import time
from dataclasses import dataclass

from loraplex.bench.random_adapters import load_model, random_adapter
from loraplex.bench.workload import random_prompts
from loraplex.engine.config import EngineConfig
from loraplex.engine.engine import Engine
from loraplex.engine.request import Request
from loraplex.engine.sampling.params import SamplingParams
from loraplex.validation import check_least

_TAIL_TOKENS = 8  # of each request's own, after the prefix


@dataclass(frozen=True, kw_only=True)
class PrefixBench:
    """Requests through one adapter, one after the other and then, with an empty cache, all at once."""

    model: str = "smollm2-135m"
    dtype: str = "bfloat16"
    prefix_tokens: int = 500
    requests: int = 8
    rounds: int = 1

    def __post_init__(self) -> None:
        check_least(self, {"prefix_tokens": 1, "requests": 2, "rounds": 1})


def run_prefix(bench: PrefixBench) -> dict[str, float]:
    """Seconds to the first token: of the first, of later ones, their ratio, and of the last when all come at once."""
    model = load_model(bench.model, bench.dtype)
    model.load_adapter("adapter", random_adapter(model.adaptable.shapes, 8, model.dtype, seed=0))
    vocab_size = model.base.get_input_embeddings().num_embeddings
    prefixes, tails = random_prompts(vocab_size, bench.prefix_tokens), random_prompts(vocab_size, _TAIL_TOKENS)
    draw = random.Random(0)
    rounds = []
    with Engine(model, EngineConfig()) as engine:
        for _ in range(bench.rounds):
            prefix = prefixes(draw)
            sampling = SamplingParams(max_tokens=1)
            requests = [
                Request(prefix + tails(draw), adapters="adapter", sampling=sampling) for _ in range(bench.requests)
            ]
            engine.clear_prefix_cache()
            apart = [_first_token_s(engine, [request])[0] for request in requests]
            engine.clear_prefix_cache()
            at_once = _first_token_s(engine, requests)
            rounds.append({"first": apart[0], "later": statistics.median(apart[1:]), "last_at_once": max(at_once)})
    results = {key: statistics.median(figures[key] for figures in rounds) for key in rounds[0]}
    return results | {"later_of_first": results["later"] / results["first"]}


def _first_token_s(engine: Engine, requests: list[Request]) -> list[float]:
    """Of requests that come at once, in their order."""
    start = time.perf_counter()
    ids = [engine.add_request(request) for request in requests]
    seconds: dict[str, float] = {}
    while engine.has_work:
        for delta in engine.step():
            seconds.setdefault(delta.request_id, time.perf_counter() - start)
            if delta.finish_reason is not None:
                engine.pop_result(delta.request_id)
    return [seconds[request_id] for request_id in ids]
