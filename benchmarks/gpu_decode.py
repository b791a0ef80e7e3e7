"""Whole decoding steps: the engine with and without adapters, mixtures with drafts, and PEFT on the same work."""

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import peft
import torch
from adapters import peft_with_adapters
from gpu_models import Shape, random_base, with_adapters
from gpu_timing import Figure, Timer

from loraplex import Engine, EngineConfig, MultiLoraModel, Request, SamplingParams, XLoraConfig
from loraplex.bench.random_adapters import write_random_folders
from loraplex.layers.base.modules import adaptable_modules
from loraplex.routing.adapter_spec import AdapterSpec

MIXTURE = "mixture"


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is decoded."""

    dtype: torch.dtype
    rows: int
    ranks: tuple[int, ...]  # of the rows' adapters, in turn
    peft_rows: int
    prompt_tokens: int
    new_tokens: int

    def ranks_of(self, rows: int) -> list[int]:
        return [self.ranks[i % len(self.ranks)] for i in range(rows)]


def decode_steps(timer: Timer, shape: Shape, sizes: Sizes) -> list[Figure]:
    """The step with one distinct adapter a row against that without adapters, both with CUDA graphs, and without."""
    model = with_adapters(random_base(shape, sizes.dtype, timer.device), sizes.ranks_of(sizes.rows))
    adapted: list[AdapterSpec] = [str(i) for i in range(sizes.rows)]
    plain: list[AdapterSpec] = [None] * sizes.rows
    base = _step_seconds(timer, model, shape, sizes, plain)
    with_all = _step_seconds(timer, model, shape, sizes, adapted)
    eager = _step_seconds(timer, model, shape, sizes, adapted, cuda_graphs=False)
    what = f"{sizes.rows} rows, ranks {sorted(set(sizes.ranks))}"
    bar = "<= 1.12x" if shape.name == "8B" and set(sizes.ranks) == {16} else ""
    ratio = with_all / base
    return [
        Figure(shape=shape.name, what=f"step without adapters, {what}", value=base * 1e3, unit="ms"),
        Figure(shape=shape.name, what=f"step with an adapter a row, {what}", value=with_all * 1e3, unit="ms"),
        Figure(shape=shape.name, what=f"the same without CUDA graphs, {what}", value=eager * 1e3, unit="ms"),
        Figure(
            shape=shape.name, what="with / without adapters", value=ratio, unit="x", bar=bar,
            holds=ratio <= 1.12 if bar and timer.is_gpu else None,
        ),
    ]  # fmt: skip


def _step_seconds(
    timer: Timer,
    model: MultiLoraModel,
    shape: Shape,
    sizes: Sizes,
    choices: Sequence[AdapterSpec],
    *,
    cuda_graphs: bool = True,
) -> float:
    """The median step while all rows decode."""
    with _engine(model, shape, sizes, len(choices), cuda_graphs=cuda_graphs) as engine:
        _add(engine, shape, sizes, choices)
        while engine.stats().counts.num_new_tokens < len(choices):
            engine.step()
        for _ in range(3):  # records the step, and a second one where a block begins
            engine.step()
        taken = []
        while engine.stats().num_running == len(choices):
            taken.append(timer.once(engine.step))
        return statistics.median(taken[:-1])


def mixture_steps(timer: Timer, shape: Shape, sizes: Sizes) -> list[Figure]:
    """One row through a mixture of 4 experts, drafted; with experts that change nothing, whose drafts are all right."""
    figures = []
    base_seconds = None
    for name, std_b in (("drafted", 0.02), ("oracle draft", 0.0)):
        model = with_adapters(random_base(shape, sizes.dtype, timer.device), [sizes.ranks[0]] * 4, std_b=std_b)
        model.create_mixture(MIXTURE, [str(i) for i in range(4)], XLoraConfig(layerwise_scalings=True))
        if base_seconds is None:
            base_seconds = _token_seconds(timer, model, shape, sizes, None)[0]
        seconds, passes = _token_seconds(timer, model, shape, sizes, MIXTURE)
        ratio, oracle = seconds / base_seconds, name == "oracle draft"
        figures += [
            Figure(shape=shape.name, what=f"X-LoRA, {name}: passes a token", value=passes, unit=""),
            Figure(
                shape=shape.name, what=f"X-LoRA, {name}: token / base token", value=ratio, unit="x",
                bar="<= 1.15x" if oracle and shape.name == "8B" else "",
                holds=ratio <= 1.15 if oracle and shape.name == "8B" and timer.is_gpu else None,
            ),
        ]  # fmt: skip
        del model
    return figures


def _token_seconds(
    timer: Timer, model: MultiLoraModel, shape: Shape, sizes: Sizes, choice: str | None
) -> tuple[float, float]:
    """Seconds and passes of one more token, behind the prompt."""
    with _engine(model, shape, sizes, 1) as engine:
        for _ in range(2):  # the first run records the steps
            _add(engine, shape, sizes, [choice])
            while engine.stats().counts.num_new_tokens % sizes.new_tokens == 0:
                engine.step()
            before = engine.stats().counts
            _synchronize(timer)
            start = time.perf_counter()
            while engine.has_work:
                engine.step()
            _synchronize(timer)
            taken, after = time.perf_counter() - start, engine.stats().counts
            num_new = after.num_new_tokens - before.num_new_tokens
    return taken / num_new, (after.num_steps - before.num_steps) / num_new


def against_peft(timer: Timer, shape: Shape, sizes: Sizes) -> list[Figure]:
    """Tokens a second of PEFT's mixed batch and of its X-LoRA, and ours on the same adapters."""
    ranks = sizes.ranks_of(sizes.peft_rows)
    base = random_base(shape, sizes.dtype, timer.device)
    with tempfile.TemporaryDirectory() as folder:
        paths = write_random_folders(adaptable_modules(base), Path(folder), ranks, sizes.dtype)
        theirs = peft_with_adapters(base, paths)
        ids = torch.randint(1, shape.vocab, (sizes.peft_rows, sizes.prompt_tokens), device=timer.device)
        options = {"min_new_tokens": sizes.new_tokens, "max_new_tokens": sizes.new_tokens, "do_sample": False}
        options["attention_mask"] = torch.ones_like(ids)
        options |= {"input_ids": ids, "adapter_names": list(paths)}
        seconds = _seconds(timer, partial(theirs.generate, **options))
        speed_theirs = ids.shape[0] * sizes.new_tokens / seconds
        del theirs, base
        mixed = _peft_mixture_speed(timer, shape, sizes, dict(list(paths.items())[:4]))
    model = with_adapters(random_base(shape, sizes.dtype, timer.device), ranks)
    speed_ours = _engine_speed(timer, model, shape, sizes, [str(i) for i in range(sizes.peft_rows)])
    model.create_mixture(MIXTURE, ["0", "1", "2", "3"], XLoraConfig(layerwise_scalings=True))
    mixed_ours = _engine_speed(timer, model, shape, sizes, [MIXTURE])
    ratio, bar = speed_ours / speed_theirs, ">= 8x" if shape.name == "8B" else ""
    rows = f"{sizes.peft_rows} rows"
    return [
        Figure(shape=shape.name, what=f"PEFT's mixed batch, {rows}", value=speed_theirs, unit="tokens/s"),
        Figure(shape=shape.name, what=f"our engine, {rows}", value=speed_ours, unit="tokens/s"),
        Figure(
            shape=shape.name, what=f"ours / PEFT's mixed batch, {rows}", value=ratio, unit="x", bar=bar,
            holds=ratio >= 8 if bar and timer.is_gpu else None,
        ),
        Figure(shape=shape.name, what="PEFT's X-LoRA, 1 row", value=mixed, unit="tokens/s"),
        Figure(shape=shape.name, what="our X-LoRA, 1 row", value=mixed_ours, unit="tokens/s"),
    ]  # fmt: skip


def _peft_mixture_speed(timer: Timer, shape: Shape, sizes: Sizes, paths: dict[str, Path]) -> float:
    base = random_base(shape, sizes.dtype, timer.device)
    base.config.use_cache = False  # PEFT refuses to make a mixture with a cache
    config = peft.XLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=shape.hidden,
        adapters={str(i): str(path) for i, path in enumerate(paths.values())},
        layerwise_scalings=True,
    )
    model = peft.get_peft_model(base, config).eval()
    ids = torch.randint(1, shape.vocab, (1, sizes.prompt_tokens), device=timer.device)
    options = {"min_new_tokens": sizes.new_tokens, "max_new_tokens": sizes.new_tokens, "do_sample": False}
    return sizes.new_tokens / _seconds(timer, lambda: model.generate(input_ids=ids, **options))


def _engine_speed(
    timer: Timer, model: MultiLoraModel, shape: Shape, sizes: Sizes, choices: Sequence[AdapterSpec]
) -> float:
    with _engine(model, shape, sizes, len(choices)) as engine:

        def run() -> None:
            _add(engine, shape, sizes, choices)
            while engine.has_work:
                engine.step()

        return len(choices) * sizes.new_tokens / _seconds(timer, run)


def _seconds(timer: Timer, run: Callable[[], object]) -> float:
    """Of the second of two runs."""
    for _ in range(2):
        _synchronize(timer)
        start = time.perf_counter()
        with torch.no_grad():
            run()
        _synchronize(timer)
    return time.perf_counter() - start


def _synchronize(timer: Timer) -> None:
    if timer.is_gpu:
        torch.cuda.synchronize()


def _engine(model: MultiLoraModel, shape: Shape, sizes: Sizes, rows: int, *, cuda_graphs: bool = True) -> Engine:
    num_tokens = 4 * rows * (sizes.prompt_tokens + sizes.new_tokens + 16)  # with room for scaling passes
    config = EngineConfig(
        max_running=rows,
        max_step_tokens=2048,
        cache_bytes=shape.cache_bytes(num_tokens, sizes.dtype),
        prefix_cache=False,
        cuda_graphs=cuda_graphs,
        max_length=sizes.prompt_tokens + sizes.new_tokens + 1,
    )
    return Engine(model, config)


def _add(engine: Engine, shape: Shape, sizes: Sizes, choices: Sequence[AdapterSpec]) -> None:
    """One request a row, with a random prompt."""
    sampling = SamplingParams(max_tokens=sizes.new_tokens, temperature=0.0, ignore_eos=True)
    for choice in choices:
        prompt = torch.randint(1, shape.vocab, (sizes.prompt_tokens,)).tolist()
        engine.add_request(Request(tuple(prompt), adapters=choice, sampling=sampling))
