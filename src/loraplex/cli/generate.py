"""`loraplex generate`: answer prompts, each through its own adapters, in the engine's shared forward passes."""

import json as json_format
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from loraplex.cli.options import Device, Dtype, IgnoreUnknown, Load, Raw, Weights, adapters_in, named_values
from loraplex.engine.config import EngineConfig
from loraplex.engine.engine import Engine
from loraplex.engine.request import Request, RequestResult
from loraplex.engine.sampling.params import SamplingParams
from loraplex.errors import RequestError
from loraplex.json_files import MAX_SETTINGS_BYTES, read_text
from loraplex.models.multi_lora import MultiLoraModel
from loraplex.models.text.sampling_defaults import sampling_defaults


def generate(
    prompts: Annotated[list[str], typer.Argument(help="Prompts; one is repeated for every --adapters.")],
    model: Annotated[
        str, typer.Option(help="Causal language model: smollm2-135m, a folder, or a hub id. Others are refused.")
    ] = "smollm2-135m",
    load: Load = [],  # noqa: B006
    load_all: Annotated[Path | None, typer.Option(help="Load every adapter folder below this one.")] = None,
    load_mixture: Annotated[list[str], typer.Option(help="NAME=FOLDER of an X-LoRA mixture to load; repeat.")] = [],  # noqa: B006
    ignore_unknown: IgnoreUnknown = False,
    adapters: Annotated[
        list[str],
        typer.Option(
            help='A row\'s adapters, in the order of the prompts: "none", "a", "a:0.7+b:0.3", "auto"; repeat.'
        ),
    ] = [],  # noqa: B006
    max_tokens: Annotated[int, typer.Option(min=1, help="New tokens at most.")] = 64,
    answers: Annotated[int, typer.Option("--answers", "-n", min=1, help="To every prompt.")] = 1,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="0 is greedy; by default the model's generation_config, else 1.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Nucleus sampling; by default the model's, else off.")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(min=0, help="Of so many likeliest tokens, 0: of all; by default the model's, else 0.")
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Least probability, relative to the likeliest; by default the model's."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of sampling.")] = 0,
    stop: Annotated[list[str], typer.Option(help="End an answer before this text; repeat.")] = [],  # noqa: B006
    json_schema: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="File of a JSON schema that every answer follows.")
    ] = None,
    raw: Raw = False,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    weights: Weights = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Answer prompts together, each through its own adapters."""
    rows = pair_rows(prompts, adapters)
    options: dict[str, Any] = {
        "max_tokens": max_tokens,
        "n": answers,
        "stop": tuple(stop),
        "json_schema": None if json_schema is None else _read_schema(json_schema),
    }
    given = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p}
    options |= {name: value for name, value in given.items() if value is not None}
    SamplingParams(**options)  # refused before the model is loaded
    multi = MultiLoraModel.from_pretrained(model, dtype=dtype, device=device, weights=weights)
    options = {**sampling_defaults(multi.base), **options}
    # A seed for each answer, so that equal rows don't get equal answers.
    sampling = [SamplingParams(seed=seed + row * answers, **options) for row in range(len(rows))]
    load_named(multi, load, load_all, load_mixture, ignore_unknown=ignore_unknown)
    start = time.perf_counter()
    results = run(multi, make_requests(rows, sampling, raw=raw), progress=not json and Console().is_terminal)
    seconds = time.perf_counter() - start
    if json:
        typer.echo(json_format.dumps(answers_as_json(rows, results), indent=2, ensure_ascii=False))
    else:
        Console().print(answer_table(rows, results, seconds))


def _read_schema(file: Path) -> str:
    try:
        return read_text(file, MAX_SETTINGS_BYTES)
    except (OSError, ValueError) as error:
        raise RequestError(f"the JSON schema in {str(file)!r} can't be read: {error}.") from error


def load_named(
    model: MultiLoraModel,
    load: Sequence[str],
    load_all: Path | None,
    load_mixture: Sequence[str],
    *,
    ignore_unknown: bool = False,
) -> None:
    """Load what the options name; one of `load` goes before a folder of the same name."""
    folders = {} if load_all is None else {name: str(path) for name, path in adapters_in(load_all).items()}
    for name, folder in {**folders, **named_values(load, "--load")}.items():
        model.load_adapter(name, folder, ignore_unknown=ignore_unknown)
    for name, folder in named_values(load_mixture, "--load-mixture").items():
        model.load_mixture(name, folder)


def pair_rows(prompts: list[str], adapters: list[str]) -> list[tuple[str, str]]:
    """One (prompt, adapters) for each row: equally many of both, one prompt for all, or base rows only."""
    if not adapters:
        return [(prompt, "none") for prompt in prompts]
    if len(prompts) == 1:
        return [(prompts[0], choice) for choice in adapters]
    if len(prompts) != len(adapters):
        raise typer.BadParameter(
            f"{len(prompts)} prompts but {len(adapters)} --adapters: give one for each prompt, or one prompt for all"
        )
    return list(zip(prompts, adapters, strict=True))


def make_requests(rows: Sequence[tuple[str, str]], sampling: Sequence[SamplingParams], *, raw: bool) -> list[Request]:
    """A request for each row."""
    return [
        Request(
            prompt if raw else [{"role": "user", "content": prompt}],
            adapters=None if choice == "none" else choice,
            sampling=params,
        )
        for (prompt, choice), params in zip(rows, sampling, strict=True)
    ]


def run(model: MultiLoraModel, requests: Sequence[Request], *, progress: bool) -> list[RequestResult]:
    """All results; raises the error of a request that failed, and BaseModelError for a model that isn't causal."""
    num_answers = sum(request.sampling.n for request in requests)
    with Engine(model, EngineConfig(max_running=max(64, num_answers))) as engine:
        results = engine.generate(requests, progress=progress)
    for result in results:
        if result.error is not None:
            raise result.error
    return results


def answers_as_json(rows: Sequence[tuple[str, str]], results: Sequence[RequestResult]) -> list[dict[str, Any]]:
    """One object for each answer."""
    return [
        {
            "prompt": prompt,
            **_choice_as_json(choice, result),
            "text": answer.text.strip(),
            "num_tokens": len(answer.token_ids),
            "finish_reason": answer.finish_reason,
        }
        for (prompt, choice), result in zip(rows, results, strict=True)
        for answer in result.completions
    ]


def _choice_as_json(choice: str, result: RequestResult) -> dict[str, Any]:
    if result.auto is None:
        return {"adapters": None if choice == "none" else choice}
    return {"adapters": result.auto.name, "auto_score": result.auto.score}


def _shown_choice(choice: str, result: RequestResult) -> str:
    """What the row asked for, and what "auto" chose."""
    return choice if result.auto is None else f"{choice}: {result.auto.name or 'none'}"


def answer_table(rows: Sequence[tuple[str, str]], results: Sequence[RequestResult], seconds: float) -> Table:
    """Prompts, adapters and answers side by side."""
    num_tokens = sum(len(answer.token_ids) for result in results for answer in result.completions)
    table = Table(box=SIMPLE_HEAD, caption=f"{num_tokens / seconds:.0f} tokens/s", caption_justify="right")
    table.add_column("adapters", style="cyan", no_wrap=True)
    table.add_column("prompt", style="dim", ratio=1)
    table.add_column("answer", ratio=1)
    for (prompt, choice), result in zip(rows, results, strict=True):
        for answer in result.completions:
            table.add_row(Text(_shown_choice(choice, result)), Text(prompt), Text(answer.text.strip()))
    return table
