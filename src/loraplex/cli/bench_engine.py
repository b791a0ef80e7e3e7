"""`loraplex bench engine`: speeds of the engine, and its endurance."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from loraplex.bench.churn import ChurnBench, run_churn
from loraplex.bench.decode import SIDES, DecodeBench, run_decode
from loraplex.bench.load import LoadBench, run_load
from loraplex.bench.prefix import PrefixBench, run_prefix
from loraplex.bench.report import console, print_table, save_json
from loraplex.cli.help import Command, make_group

engine_app = make_group(
    "Speeds of the engine, and its endurance. Without a command: all of them, as small as they are by default.",
    invoke_without_command=True,
    no_args_is_help=False,
)

Model = Annotated[str, typer.Option(help="Base model: smollm2-135m, a folder, a hub id, or tiny (random weights).")]
Dtype = Annotated[str, typer.Option(help="Dtype of the base model.")]
Rounds = Annotated[int | None, typer.Option(help="Runs of each side, in turn; medians are given.")]
Full = Annotated[bool, typer.Option("--full", help="The long workload that the documentation's figures come from.")]
Output = Annotated[Path | None, typer.Option(help="JSON file for results, workload, machine and versions.")]
OUTPUT = Path("runs/bench")


@engine_app.callback()
def engine(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        decode()
        prefix()
        load()
        churn()


@engine_app.command(cls=Command)
def decode(
    model: Model = "smollm2-135m",
    case: Annotated[list[str] | None, typer.Option(help="DTYPE:ROWS to measure; repeat.")] = None,
    side: Annotated[
        list[str] | None, typer.Option(help=f"Sides to measure, of {', '.join(SIDES)}; repeat. Default: all.")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of every row's prompt.")] = 32,
    new_tokens: Annotated[int | None, typer.Option(help="New tokens of every row.")] = None,
    rounds: Rounds = None,
    full: Full = False,
    output: Output = None,
) -> None:
    """Decoding tokens/s: transformers' generate, and the engine without adapters, with them, and with a mixture."""
    cases = case or (["bfloat16:1", "bfloat16:8", "float32:8", "bfloat16:32"] if full else ["bfloat16:1", "bfloat16:8"])
    sides = tuple(side or SIDES)
    benches = [
        DecodeBench(
            model=model,
            dtype=dtype,
            rows=rows,
            sides=sides,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens or (129 if full else 33),
            rounds=rounds or (5 if full else 1),
        )
        for dtype, rows in map(read_case, cases)
    ]
    results = []
    for bench in benches:
        with console.status(f"{bench.rows} rows in {bench.dtype} ..."):
            results.append(run_decode(bench))
    table = [
        [f"{result['dtype']}, {result['rows']} rows", *(f"{result['tokens_per_s'][side]:.0f}" for side in sides)]
        for result in results
    ]
    print_table(f"{model}: decoding, tokens/s", ["case", *sides], table)
    workload = {key: value for key, value in asdict(benches[0]).items() if key not in ("dtype", "rows")}
    _save(
        output, "engine_decode", {**workload, "cases": cases, "ranks": "8 16 4 32 8 8 8 8", "targets": "all 7"}, results
    )


@engine_app.command(cls=Command)
def prefix(
    model: Model = "smollm2-135m",
    dtype: Dtype = "bfloat16",
    prefix_tokens: Annotated[int | None, typer.Option(help="Tokens that all requests begin with.")] = None,
    requests: Annotated[int | None, typer.Option(help="Requests that share them.")] = None,
    rounds: Rounds = None,
    full: Full = False,
    output: Output = None,
) -> None:
    """Seconds to the first token for requests that share a long prefix."""
    bench = PrefixBench(
        model=model,
        dtype=dtype,
        prefix_tokens=prefix_tokens or (1000 if full else 500),
        requests=requests or (16 if full else 8),
        rounds=rounds or (3 if full else 1),
    )
    with console.status(f"{bench.requests} requests that share {bench.prefix_tokens} tokens ..."):
        results = run_prefix(bench)
    keys = ("first", "later", "later_of_first", "last_at_once")
    print_table(
        f"{bench.requests} requests that share {bench.prefix_tokens} tokens: seconds to the first token",
        ["first", "later ones", "ratio", "all at once, last"],
        [[f"{results[key]:.3f}" for key in keys]],
    )
    _save(output, "engine_prefix", asdict(bench), results)


@engine_app.command(cls=Command)
def load(
    model: Model = "smollm2-135m",
    dtype: Dtype = "bfloat16",
    adapters: Annotated[int | None, typer.Option(help="Adapters on disk, of ranks 4 to 32.")] = None,
    host_adapters: Annotated[int | None, typer.Option(help="Adapters that fit into host memory.")] = None,
    exponent: Annotated[float, typer.Option(help="Exponent of Zipf's law.")] = 1.0,
    seconds: Annotated[float | None, typer.Option(help="Seconds of each stream, in all its turns.")] = None,
    rounds: Annotated[int | None, typer.Option(help="Turns of each stream; the capacity is measured before.")] = None,
    share: Annotated[float, typer.Option(help="Share of the capacity that arrives.")] = 0.7,
    prompts: Annotated[
        list[Path] | None, typer.Option(help="Chat files whose questions are the prompts, data/quantum/test.jsonl.")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of random prompts, without --prompts.")] = 32,
    new_tokens: Annotated[int, typer.Option(help="New tokens of every request.")] = 32,
    seed: Annotated[int, typer.Option(help="Seed of what is random.")] = 0,
    full: Full = False,
    output: Output = None,
) -> None:
    """Requests that arrive at random for many adapters, by Zipf's law, against the same stream for eight."""
    num_adapters = adapters or (1000 if full else 40)
    bench = LoadBench(
        model=model,
        dtype=dtype,
        adapters=num_adapters,
        resident=min(8, num_adapters),
        host_adapters=host_adapters or (300 if full else 12),
        exponent=exponent,
        seconds=seconds or (600 if full else 15),
        rounds=rounds or (20 if full else 1),
        share=share,
        prompt_tokens=prompt_tokens,
        prompt_files=tuple(str(file) for file in prompts or ()),
        new_tokens=new_tokens,
        seed=seed,
    )
    with console.status("starting ...") as status:
        results = run_load(bench, tell=status.update)
    table = [[f"the same {bench.resident}", *_stream_row(results["resident"])]]
    table.append([f"{bench.adapters} by Zipf's law", *_stream_row(results["zipf"])])
    columns = [
        "adapters",
        "tokens/s",
        "first token p50, s",
        "p99",
        "median turn's",
        "request p50, s",
        "p99",
        "requests",
    ]
    print_table(f"open loop at {share:.0%} of capacity", columns, table)
    _save(output, "engine_load", asdict(bench), results)


@engine_app.command(cls=Command)
def churn(
    model: Model = "tiny",
    requests: Annotated[int | None, typer.Option(help="Requests to random adapters, links and a mixture.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of what is random.")] = 0,
    full: Full = False,
    output: Output = None,
) -> None:
    """Random cancels, bad requests, replaced and unloaded adapters: every answer right, nothing left behind?

    Ends with status 1 if not.
    """
    bench = ChurnBench(model=model, requests=requests or (10_000 if full else 1000), seed=seed)
    with console.status("starting ...") as status:
        report = run_churn(bench, tell=status.update)
    keys = ("finished", "checked", "ties", "cancelled", "refused", "replaced", "unloaded", "without_adapter")
    counts = report.as_json()
    print_table(
        f"{bench.requests} requests in {report.seconds:.0f} s",
        [key.replace("_", " ") for key in keys] + ["problems"],
        [[f"{counts[key]}" for key in keys] + [str(len(report.problems))]],
    )
    _save(output, "engine_churn", asdict(bench), counts)
    for problem in report.problems[:10]:
        console.print(problem, style="red", markup=False)
    if report.problems:
        raise typer.Exit(1)


def read_case(case: str) -> tuple[str, int]:
    """The dtype and the number of rows of a case such as bfloat16:8."""
    dtype, _, rows = case.partition(":")
    if not dtype or not rows.isdigit():
        raise typer.BadParameter(f"{case!r} is not DTYPE:ROWS, for example --case bfloat16:8")
    return dtype, int(rows)


def _stream_row(report: dict[str, Any]) -> Sequence[str]:
    first, whole = report["first_token_s"], report["request_s"]
    times = (first["p50"], first["p99"], statistics.median(report["turn_p99_s"]), whole["p50"], whole["p99"])
    return [f"{report['tokens_per_s']:.0f}", *(f"{seconds:.2f}" for seconds in times), str(report["requests"])]


def _save(output: Path | None, name: str, workload: dict[str, Any], results: Any) -> None:
    save_json(output or OUTPUT / f"{name}.json", workload, results)
