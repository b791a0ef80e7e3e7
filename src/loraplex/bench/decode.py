"""How fast does the engine decode: against transformers' generate, with adapters, and with mixtures?"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from loraplex.bench.measures import alternate, medians
from loraplex.bench.random_adapters import TINY, load_model, random_adapter, tiny_llama
from loraplex.engine.config import EngineConfig
from loraplex.engine.engine import Engine
from loraplex.engine.request import Request
from loraplex.engine.sampling.params import SamplingParams
from loraplex.errors import ConfigError
from loraplex.models.checkpoints.loading import load_base_model
from loraplex.models.multi_lora import MultiLoraModel
from loraplex.routing.adapter_spec import AdapterSpec
from loraplex.validation import check_least
from loraplex.xlora.config import XLoraConfig

SIDES = ("generate", "base", "adapters", "rank8", "mixture")
RANKS = (8, 16, 4, 32, 8, 8, 8, 8)  # of "adapters"; those of "rank8" and the experts have 8
EXPERTS = ("expert0", "expert1", "expert2", "expert3")


@dataclass(frozen=True, kw_only=True)
class DecodeBench:
    """The workload. Sides: transformers' generate of the plain base model; the engine without adapters, with one of
    mixed ranks a row, with one of rank 8 a row, and with one mixture of four experts for all rows.
    """

    model: str = "smollm2-135m"
    dtype: str = "bfloat16"
    rows: int = 8
    sides: tuple[str, ...] = SIDES
    prompt_tokens: int = 32
    new_tokens: int = 33
    rounds: int = 1

    def __post_init__(self) -> None:
        unknown = [side for side in self.sides if side not in SIDES]
        if unknown or not self.sides:
            raise ConfigError(f"sides has {unknown or 'nothing'}; choose from {list(SIDES)}.")
        check_least(self, dict.fromkeys(("rows", "prompt_tokens", "rounds"), 1))
        if self.new_tokens < 2:
            raise ConfigError(f"new_tokens is {self.new_tokens}; speeds are those beyond the first token, so give 2.")


def run_decode(bench: DecodeBench) -> dict[str, Any]:
    """Medians of decoding tokens/s by side, alternating in one process: a run less one of a single token."""
    model = _make_model(bench)
    vocab_size = model.base.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size // 8, vocab_size, (bench.rows, bench.prompt_tokens), generator=generator)
    config = EngineConfig(max_running=max(32, bench.rows), prefix_cache=False)
    with Engine(model, config) as engine:
        runs: dict[str, Callable[[int], None]] = {}
        for side in bench.sides:
            if side == "generate":
                runs[side] = _generate_run(bench, ids)
            else:
                runs[side] = _engine_run(engine, ids.tolist(), _choices(side, bench.rows))
        timed = {side: (lambda run=run: _decoding_speed(run, bench)) for side, run in runs.items()}
        speeds = medians(alternate(timed, bench.rounds))
    return {"dtype": bench.dtype, "rows": bench.rows, "tokens_per_s": speeds}


def _make_model(bench: DecodeBench) -> MultiLoraModel:
    """Only the adapters that the sides need."""
    model = load_model(bench.model, bench.dtype)
    shapes = model.adaptable.shapes

    def load(name: str, rank: int, seed: int) -> None:
        model.load_adapter(name, random_adapter(shapes, rank, model.dtype, seed))

    for row in range(bench.rows):
        if "adapters" in bench.sides:
            load(f"mixed{row}", RANKS[row % len(RANKS)], row)
        if "rank8" in bench.sides:
            load(f"rank8-{row}", 8, 1000 + row)
    if "mixture" in bench.sides:
        for seed, expert in enumerate(EXPERTS):
            load(expert, 8, 2000 + seed)
        model.create_mixture("mixture", EXPERTS, XLoraConfig(layerwise_scalings=True))
    return model


def _choices(side: str, rows: int) -> list[AdapterSpec]:
    named = {"base": None, "adapters": "mixed{}", "rank8": "rank8-{}", "mixture": "mixture"}[side]
    return [None if named is None else named.format(row) for row in range(rows)]


def _generate_run(bench: DecodeBench, ids: torch.Tensor) -> Callable[[int], None]:
    plain: Any = tiny_llama() if bench.model == TINY else load_base_model(bench.model, dtype=bench.dtype)[0]

    def run(new_tokens: int) -> None:
        lengths = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens}
        plain.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **lengths)

    return run


def _engine_run(engine: Engine, prompts: list[list[int]], choices: Sequence[AdapterSpec]) -> Callable[[int], None]:
    def run(new_tokens: int) -> None:
        sampling = SamplingParams(max_tokens=new_tokens, ignore_eos=True)
        rows = zip(prompts, choices, strict=True)
        results = engine.generate([Request(prompt, adapters=choice, sampling=sampling) for prompt, choice in rows])
        assert all(len(result.token_ids) == new_tokens for result in results), "an answer ended early"

    return run


def _decoding_speed(run: Callable[[int], None], bench: DecodeBench) -> float:
    """Tokens/s beyond the first of each row."""
    start = time.perf_counter()
    run(1)
    middle = time.perf_counter()
    run(bench.new_tokens)
    seconds = (time.perf_counter() - middle) - (middle - start)
    return bench.rows * (bench.new_tokens - 1) / seconds
