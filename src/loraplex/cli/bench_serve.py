"""`loraplex bench serve`: an open-loop load against any OpenAI-compatible server."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from loraplex.bench.report import console, print_table, save_json
from loraplex.cli.options import ApiKey
from loraplex.extras import require_extra

OUTPUT = Path("runs/bench/serve.json")
_TIMES = {
    "first_token_s": "time to first token",
    "token_s": "time per later token",
    "request_s": "whole request",
    "generator_lag_s": "the generator's lag",
}


def serve_load(
    url: Annotated[
        str, typer.Option(help="Address of the server: loraplex, vLLM, LoRAX, ...")
    ] = "http://127.0.0.1:8000",
    api_key: ApiKey = None,
    rate: Annotated[float | None, typer.Option(help="Requests/s. Default: --share of the measured capacity.")] = None,
    share: Annotated[float, typer.Option(help="Share of the capacity that arrives, without --rate.")] = 0.7,
    flood: Annotated[int, typer.Option(help="Requests at once that measure the capacity, without --rate.")] = 96,
    seconds: Annotated[float, typer.Option(help="How long requests arrive.")] = 30,
    adapters: Annotated[
        str | None, typer.Option(help="Names or links, separated by commas. Default: what /v1/models lists.")
    ] = None,
    exponent: Annotated[float, typer.Option(help="Exponent of Zipf's law; 0: all adapters alike.")] = 1.0,
    prompts: Annotated[
        list[Path] | None, typer.Option(help="Chat files whose questions are the prompts, data/quantum/test.jsonl.")
    ] = None,
    prompt_words: Annotated[int, typer.Option(help="Words of random prompts, without --prompts.")] = 32,
    max_tokens: Annotated[int, typer.Option(help="New tokens of an answer.")] = 32,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Answers of --max-tokens (loraplex, vLLM).")] = False,
    concurrency: Annotated[int, typer.Option(help="Requests open at once; more wait, which counts.")] = 512,
    timeout_s: Annotated[float, typer.Option(help="Seconds that a request may take.")] = 120,
    seed: Annotated[int, typer.Option(help="Seed of arrivals, adapters and prompts.")] = 0,
    output: Annotated[Path, typer.Option(help="JSON file for results, workload, machine and versions.")] = OUTPUT,
) -> None:
    """Requests that arrive at random at a server for many adapters, by Zipf's law: throughput and waiting times."""
    require_extra("bench", "loraplex bench serve")
    from loraplex.bench.serve_load import ServeBench, run_serve

    bench = ServeBench(
        url=url,
        rate=rate,
        share=share,
        flood=flood,
        seconds=seconds,
        adapters=tuple(name.strip() for name in (adapters or "").split(",") if name.strip()),
        exponent=exponent,
        prompt_files=tuple(str(file) for file in prompts or ()),
        prompt_words=prompt_words,
        max_tokens=max_tokens,
        ignore_eos=ignore_eos,
        concurrency=concurrency,
        timeout_s=timeout_s,
        seed=seed,
    )
    with console.status("starting ...") as status:
        results = run_serve(bench, api_key=api_key, tell=status.update)
    _print(url, results)
    save_json(output, asdict(bench), results)


def _print(url: str, results: dict[str, Any]) -> None:
    capacity = results["capacity_requests_per_s"]
    rows = [
        ["asked for, requests/s", f"{results['rate']:.2f}"],
        *([] if capacity is None else [["measured capacity, requests/s", f"{capacity:.2f}"]]),
        ["finished, requests/s", f"{results['requests_per_s']:.2f}"],
        ["new tokens/s", f"{results['new_tokens_per_s']:.0f}"],
        ["prompt tokens/s", f"{results['prompt_tokens_per_s']:.0f}"],
        ["adapters asked for, of listed", f"{results['adapters_asked']} of {results['adapters_listed']}"],
        ["requests", str(results["requests"])],
        *([f"failed: {status}", str(count)] for status, count in results["errors"].items()),
    ]
    print_table(f"{url}: {results['seconds']:.1f} s", ["", ""], rows)
    table = [
        [name, *(f"{1000 * results[key][at]:.1f}" for at in ("p50", "p90", "p99"))] for key, name in _TIMES.items()
    ]
    print_table("milliseconds", ["", "p50", "p90", "p99"], table)
    for message in results["messages"]:
        console.print(message, style="red", markup=False)
    for warning in results["warnings"]:
        console.print(f"warning: {warning}", style="yellow", markup=False)
