"""`loraplex generate`: answer prompts in one batch, each through its own adapters."""

import json as json_format
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from loraplex.cli.options import adapters_in, named_values
from loraplex.models.multi_lora import MultiLoraModel
from loraplex.models.text import TextBatch, generate_texts


def generate(
    prompts: Annotated[list[str], typer.Argument(help="Prompts; one is repeated for every --adapters.")],
    model: Annotated[str, typer.Option(help="Base model: smollm2-135m, a folder, or a hub id.")] = "smollm2-135m",
    load: Annotated[list[str], typer.Option(help="NAME=FOLDER of an adapter to load; repeat.")] = [],  # noqa: B006
    load_all: Annotated[Path | None, typer.Option(help="Load every adapter folder below this one.")] = None,
    adapters: Annotated[
        list[str],
        typer.Option(help='A row\'s adapters, in the order of the prompts: "none", "a", or "a:0.7+b:0.3"; repeat.'),
    ] = [],  # noqa: B006
    max_tokens: Annotated[int, typer.Option(min=1, help="New tokens at most.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Nucleus sampling.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompts as they are, without chat template.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Answer prompts in one batch, each row through its own adapters."""
    rows = pair_rows(prompts, adapters)
    multi = MultiLoraModel.from_pretrained(model, dtype=dtype, device=device)
    folders = {} if load_all is None else {name: str(path) for name, path in adapters_in(load_all).items()}
    for name, folder in {**folders, **named_values(load, "--load")}.items():
        multi.load_adapter(name, folder)
    choices = [None if choice == "none" else choice for _, choice in rows]
    batch = generate_texts(
        multi,
        [prompt for prompt, _ in rows],
        adapters=choices,
        chat=not raw,
        max_new_tokens=max_tokens,
        **sampling(temperature, top_p, seed),
    )
    if json:
        answers = [
            {"prompt": prompt, "adapters": choice, "text": text, "num_tokens": num_tokens}
            for (prompt, _), choice, text, num_tokens in zip(rows, choices, batch.texts, batch.num_tokens, strict=True)
        ]
        typer.echo(json_format.dumps(answers, indent=2, ensure_ascii=False))
    else:
        Console().print(answer_table(rows, batch))


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


def sampling(temperature: float, top_p: float, seed: int) -> dict[str, Any]:
    """transformers' options for a temperature; 0 is greedy."""
    if temperature == 0:
        return {"do_sample": False}
    import torch

    torch.manual_seed(seed)
    return {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}


def answer_table(rows: list[tuple[str, str]], batch: TextBatch) -> Table:
    """Prompts, adapters and answers side by side."""
    table = Table(box=SIMPLE_HEAD, caption=f"{batch.tokens_per_s:.0f} tokens/s", caption_justify="right")
    table.add_column("adapters", style="cyan", no_wrap=True)
    table.add_column("prompt", style="dim", ratio=1)
    table.add_column("answer", ratio=1)
    for (prompt, choice), text in zip(rows, batch.texts, strict=True):
        table.add_row(choice, prompt, text)
    return table
