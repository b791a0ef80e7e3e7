"""`loraplex generate`: answer prompts, each through its own adapters, in the engine's shared forward passes."""

import json as json_format
import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from loraplex.cli.generating.output import answer_table, answers_as_json, write_json_lines, write_text
from loraplex.cli.generating.rows import BASE, STANDARD, Row, pair_rows, read_prompts, read_rows
from loraplex.cli.generating.streaming import run_in_order
from loraplex.cli.help import sections
from loraplex.cli.options import Device, Dtype, IgnoreUnknown, Load, LoadAll, LoadMixture, Raw, Weights, load_named
from loraplex.cli.sampling import MaxTokens, MinP, Stop, System, Temperature, TopK, TopP, given_sampling
from loraplex.cli.wording import in_flags
from loraplex.engine.config import EngineConfig
from loraplex.engine.engine import Engine
from loraplex.engine.request import Request, RequestResult
from loraplex.engine.sampling.params import SamplingParams
from loraplex.errors import LoraplexError, RequestError
from loraplex.json_files import MAX_SETTINGS_BYTES, read_text
from loraplex.models.multi_lora import MultiLoraModel
from loraplex.models.text.sampling_defaults import sampling_defaults

MAX_RUNNING = 64  # answers that are made at once, of the rows of --input


@sections(
    model="Model and adapters",
    input="Prompts",
    max_tokens="Sampling",
    stream="Output",
)
def generate(
    context: typer.Context,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(help="Prompts, - being standard input; one is repeated for every --adapters."),
    ] = None,
    model: Annotated[
        str, typer.Option(help="Causal language model: smollm2-135m, a folder, or a hub id. Others are refused.")
    ] = "smollm2-135m",
    load: Load = [],  # noqa: B006
    load_all: LoadAll = None,
    load_mixture: LoadMixture = [],  # noqa: B006
    ignore_unknown: IgnoreUnknown = False,
    adapters: Annotated[
        list[str],
        typer.Option(
            help='A row\'s adapters, in the order of the prompts: "none", "a", "a:0.7+b:0.3", "auto"; repeat.'
        ),
    ] = [],  # noqa: B006
    dtype: Dtype = "auto",
    device: Device = "cpu",
    weights: Weights = "auto",
    input: Annotated[
        str | None,
        typer.Option(
            help='JSON lines of {"prompt": ..} or {"messages": [..]}, - being standard input; "adapters" and options '
            "of sampling may stand beside. Each answer is a line with all that its row has."
        ),
    ] = None,
    system: System = None,
    raw: Raw = False,
    max_tokens: MaxTokens = 64,
    answers: Annotated[int, typer.Option("--answers", "-n", min=1, help="Answers to every prompt.")] = 1,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of sampling; each answer has one of its own, counted up from this.")
    ] = 0,
    stop: Stop = [],  # noqa: B006
    json_schema: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="File of a JSON schema that every answer follows.")
    ] = None,
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="Write answers as they grow, with --json a line for each. By default a single one.",
            show_default=False,
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Write JSON instead of a table or text.")] = False,
) -> None:
    """Answer prompts together, each through its own adapters."""
    if raw and system is not None:
        raise RequestError("--system is a turn of a chat, but with --raw there are no turns. Leave one of them out.")
    options = given_sampling(max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p)
    options |= {"n": answers, "stop": tuple(stop)}
    options |= {} if json_schema is None else {"json_schema": _read_schema(json_schema)}
    SamplingParams(**options)  # refused before the model is loaded
    rows = [] if input is not None else pair_rows(read_prompts(prompts or []), adapters)
    lines = None if input is None else _rows_of_input(input, prompts or [], adapters)
    multi = MultiLoraModel.from_pretrained(model, dtype=dtype, device=device, weights=weights)
    load_named(multi, load, load_all, load_mixture, ignore_unknown=ignore_unknown)
    options = {**sampling_defaults(multi.base), **options}
    asked = _Asked(options, seed=seed, system=system, raw=raw)
    told = partial(in_flags, parameters=context.command.params)
    if lines is not None:
        with Engine(multi, EngineConfig(max_running=max(MAX_RUNNING, answers))) as engine:
            num_failed = write_json_lines(run_in_order(engine, asked.requests(lines), MAX_RUNNING), asked.row, told)
        if num_failed:
            raise typer.Exit(1)
        return
    requests = [asked.request(row, number) for number, row in enumerate(rows)]
    if stream if stream is not None else (not json and len(rows) * answers == 1):
        _stream(multi, rows, requests, told if json else None)
        return
    start = time.perf_counter()
    results = run(multi, requests, progress=not json and Console().is_terminal)
    seconds = time.perf_counter() - start
    if json:
        found = [answer for row, result in zip(rows, results, strict=True) for answer in answers_as_json(row, result)]
        typer.echo(json_format.dumps(found, indent=2, ensure_ascii=False))
    else:
        Console().print(answer_table(rows, results, seconds))


class _Asked:
    """Makes requests of rows, and remembers the rows whose answers are still to be written."""

    def __init__(self, options: dict[str, Any], *, seed: int, system: str | None, raw: bool) -> None:
        self._options = options
        self._seed = seed
        self._system = system
        self._raw = raw
        self._rows: dict[int, Row] = {}

    def request(self, row: Row, number: int) -> Request:
        """Each answer has its own seed, so that equal rows don't get equal answers."""
        options = {**self._options, "seed": self._seed + number * self._options["n"]}
        return row.request(options, system=self._system, raw=self._raw)

    def requests(self, rows: Iterator[Row | LoraplexError | None]) -> Iterator[Request | LoraplexError | None]:
        """What is wrong with a row is an error in its place; None is no row yet."""
        number = 0
        for row in rows:
            if row is None:
                yield None
                continue
            yield row if isinstance(row, LoraplexError) else self._checked(row, number)
            number += 1

    def _checked(self, row: Row, number: int) -> Request | LoraplexError:
        self._rows[number] = row
        try:
            return self.request(row, number)
        except LoraplexError as error:
            return error

    def row(self, number: int) -> Row | None:
        """The row of that number, once."""
        return self._rows.pop(number, None)


def _rows_of_input(
    source: str, prompts: Sequence[str], adapters: Sequence[str]
) -> Iterator[Row | LoraplexError | None]:
    if prompts:
        raise typer.BadParameter("--input has the prompts: leave out those of the command line")
    if len(adapters) > 1:
        raise typer.BadParameter('with --input one --adapters is for all rows; others are for a row\'s "adapters"')
    if source != STANDARD and not os.path.isfile(source):
        raise typer.BadParameter(f"--input {source!r} is no file; give one, or - for standard input")
    return read_rows(source, adapters[0] if adapters else BASE)


def _read_schema(file: Path) -> str:
    try:
        return read_text(file, MAX_SETTINGS_BYTES)
    except (OSError, ValueError) as error:
        raise RequestError(f"the JSON schema in {str(file)!r} can't be read: {error}.") from error


def _stream(
    model: MultiLoraModel, rows: Sequence[Row], requests: Sequence[Request], told: Callable[[str], str] | None
) -> None:
    """As text, or with `told` as JSON lines."""
    num_answers = requests[0].sampling.n
    max_running = max(MAX_RUNNING, num_answers * len(requests))
    with Engine(model, EngineConfig(max_running=max_running)) as engine:
        events = run_in_order(engine, requests, max_running)
        if told is None:
            write_text(events, rows, num_answers)
        elif write_json_lines(events, lambda number: rows[number], told):
            raise typer.Exit(1)


def run(model: MultiLoraModel, requests: Sequence[Request], *, progress: bool) -> list[RequestResult]:
    """All results; raises the error of a request that failed, and BaseModelError for a model that isn't causal."""
    num_answers = sum(request.sampling.n for request in requests)
    with Engine(model, EngineConfig(max_running=max(64, num_answers))) as engine:
        results = engine.generate(requests, progress=progress)
    for result in results:
        if result.error is not None:
            raise result.error
    return results
