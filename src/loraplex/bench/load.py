"""Do a thousand registered adapters slow the engine down, when requests for them come at random?"""

import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loraplex.adapters.store.store import StoreConfig
from loraplex.bench.measures import percentiles
from loraplex.bench.random_adapters import load_model, write_random_folders
from loraplex.bench.workload import (
    NameSource,
    PromptSource,
    file_prompts,
    poisson_times,
    random_prompts,
    uniform_names,
    zipf_names,
)
from loraplex.engine.config import EngineConfig
from loraplex.engine.engine import Engine
from loraplex.engine.request import Request
from loraplex.engine.sampling.params import SamplingParams
from loraplex.errors import ConfigError
from loraplex.models.multi_lora import MultiLoraModel
from loraplex.validation import check_least

RANKS = (8, 16, 4, 32)
_WARM_UP = 16  # requests
_FLOOD = 96  # requests that come at once: their speed is the capacity
_IDLE_S = 0.01


@dataclass(frozen=True, kw_only=True)
class LoadBench:
    """Requests arrive in a Poisson stream, whatever the engine is doing (open loop), at a share of its capacity.

    Two streams take turns: with a few adapters that stay in slots, and with all of them, drawn by Zipf's law. Before
    each turn of both the capacity is measured anew: other users of the machine change it.
    """

    model: str = "smollm2-135m"
    dtype: str = "bfloat16"
    adapters: int = 40
    resident: int = 8  # adapters of the first stream
    host_adapters: int = 12  # that fit into host memory; the others are read from disk
    exponent: float = 1.0
    seconds: float = 15  # of each stream, in all its turns
    rounds: int = 1
    share: float = 0.7  # of the capacity that the resident adapters reach
    prompt_tokens: int = 32
    prompt_files: tuple[str, ...] = ()  # chat files whose questions are the prompts, instead of random tokens
    new_tokens: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.resident <= self.adapters:
            raise ConfigError(f"resident is {self.resident}; it must be from 1 to the number of adapters.")
        check_least(self, dict.fromkeys(("host_adapters", "prompt_tokens", "new_tokens", "rounds"), 1))
        for option in ("seconds", "share"):
            if not getattr(self, option) > 0:
                raise ConfigError(f"{option} is {getattr(self, option)}; it must be above 0.")


@dataclass
class Stream:
    """What one stream of requests met."""

    first_token_s: list[float] = field(default_factory=list)  # from the arrival, waiting included
    request_s: list[float] = field(default_factory=list)
    num_tokens: int = 0
    seconds: float = 0.0
    turn_p99_s: list[float] = field(default_factory=list)  # to the first token: one slow turn may be the machine's

    def add_turn(self, other: "Stream") -> None:
        self.turn_p99_s.append(percentiles(other.first_token_s)["p99"])
        self.first_token_s += other.first_token_s
        self.request_s += other.request_s
        self.num_tokens += other.num_tokens
        self.seconds += other.seconds

    def report(self) -> dict[str, Any]:
        return {
            "tokens_per_s": self.num_tokens / self.seconds,
            "first_token_s": percentiles(self.first_token_s),
            "turn_p99_s": self.turn_p99_s,
            "request_s": percentiles(self.request_s),
            "requests": len(self.request_s),
        }


def run_load(bench: LoadBench, tell: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """The report of both streams, and the median capacity in requests/s; `tell` hears what happens."""
    with tempfile.TemporaryDirectory() as folder:
        tell(f"writing {bench.adapters} adapters ...")
        model, names = _make_model(bench, Path(folder))
        popular = random.Random(bench.seed + 1).sample(names, len(names))  # the order of zipf_names
        sources = {
            "resident": uniform_names(popular[: bench.resident]),
            "zipf": zipf_names(names, bench.exponent, bench.seed + 1),
        }
        streams, capacities = {side: Stream() for side in sources}, []
        with Engine(model, EngineConfig()) as engine:
            prompts = _prompts(bench, model)
            run_stream(engine, _requests(bench, prompts, sources["resident"], [0.0] * _WARM_UP, draw="warm-up"))
            for turn in range(bench.rounds):
                tell("measuring the capacity ...")
                flood = _requests(bench, prompts, sources["resident"], [0.0] * _FLOOD, draw=f"{turn} flood")
                capacities.append(len(flood) / run_stream(engine, flood).seconds)
                rate, seconds = bench.share * capacities[-1], bench.seconds / bench.rounds
                times = poisson_times(rate, seconds, random.Random(f"{bench.seed} {turn}"))
                if not times:
                    raise ConfigError(f"no request came in {seconds} s at {rate:.2f} a second; give more seconds.")
                for side, source in sources.items():
                    tell(f"{side}: {rate:.2f} of {capacities[-1]:.2f} possible requests/s for {seconds:.0f} s ...")
                    requests = _requests(bench, prompts, source, times, draw=f"{turn} {side}")
                    streams[side].add_turn(run_stream(engine, requests))
    reports = {side: stream.report() for side, stream in streams.items()}
    return {"capacity_requests_per_s": statistics.median(capacities), "turn_capacities": capacities} | reports


def run_stream(engine: Engine, arrivals: Sequence[tuple[float, Request]]) -> Stream:
    """Add every request at its time and step in between; the clock runs on when the engine is behind."""
    stream, left = Stream(), list(reversed(arrivals))
    arrived: dict[str, float] = {}
    silent: set[str] = set()  # have no token yet
    start = time.perf_counter()
    while left or engine.has_work:
        now = time.perf_counter() - start
        while left and left[-1][0] <= now:
            at, request = left.pop()
            request_id = engine.add_request(request)
            arrived[request_id] = at
            silent.add(request_id)
        if not engine.has_work:
            time.sleep(min(_IDLE_S, left[-1][0] - now))
            continue
        deltas = engine.step()
        now = time.perf_counter() - start
        for delta in deltas:
            stream.num_tokens += len(delta.token_ids)
            if delta.token_ids and delta.request_id in silent:
                silent.remove(delta.request_id)
                stream.first_token_s.append(now - arrived[delta.request_id])
            if delta.finish_reason is not None:
                if delta.error is not None:
                    raise delta.error
                stream.request_s.append(now - arrived.pop(delta.request_id))
                engine.pop_result(delta.request_id)
    stream.seconds = time.perf_counter() - start
    return stream


def _make_model(bench: LoadBench, folder: Path) -> tuple[MultiLoraModel, list[str]]:
    """A model with all adapters registered, and their names; host memory holds some of them."""
    probe = load_model(bench.model, bench.dtype)
    ranks = [RANKS[i % len(RANKS)] for i in range(bench.adapters)]
    paths = write_random_folders(probe.adaptable.shapes, folder, ranks, probe.dtype)
    mean_bytes = sum(file.stat().st_size for file in folder.rglob("*.safetensors")) // bench.adapters
    store = StoreConfig(host_bytes=mean_bytes * bench.host_adapters, num_slots=64)
    model = load_model(bench.model, bench.dtype, store)
    for name, path in paths.items():
        model.load_adapter(name, path)
    return model, sorted(paths)


def _prompts(bench: LoadBench, model: MultiLoraModel) -> PromptSource:
    if bench.prompt_files:
        return file_prompts(model.tokenizer, [Path(file) for file in bench.prompt_files])
    return random_prompts(model.base.get_input_embeddings().num_embeddings, bench.prompt_tokens)


def _requests(
    bench: LoadBench, prompts: PromptSource, names: NameSource, times: Sequence[float], draw: str
) -> list[tuple[float, Request]]:
    """One request for each time, from a draw of its own: prompts that came before would be in the prefix cache."""
    prompt_draw, name_draw = random.Random(f"{bench.seed} prompts {draw}"), random.Random(f"{bench.seed} names {draw}")
    sampling = SamplingParams(max_tokens=bench.new_tokens, ignore_eos=True)
    return [(at, Request(prompts(prompt_draw), adapters=names(name_draw), sampling=sampling)) for at in times]
