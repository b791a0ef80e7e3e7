"""`loraplex auto`: what lets a prompt choose its adapter."""

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from loraplex.adapters.prompt_centroid import PromptCentroid, write_centroid
from loraplex.cli.help import Command, make_group
from loraplex.cli.options import Device, Dtype, Model, Raw, Weights, named_values
from loraplex.models.auto.prompt_states import MAX_PROMPTS, background_tokens, fit_centroids, prompt_tokens
from loraplex.models.multi_lora import MultiLoraModel
from loraplex.training.data.records import read_records

auto_app = make_group("Let prompts choose their adapters: adapters=auto.")


@auto_app.callback()
def auto() -> None:
    """Let prompts choose their adapters: adapters=auto."""


@auto_app.command(cls=Command)
def fit(
    data: Annotated[
        list[str],
        typer.Option(
            help="FOLDER=FILE: an adapter's or mixture's folder, and JSON lines of records as for training; repeat."
        ),
    ],
    model: Model = "smollm2-135m",
    limit: Annotated[int, typer.Option(min=1, max=MAX_PROMPTS, help="Prompts of each file at most.")] = MAX_PROMPTS,
    raw: Raw = False,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    weights: Weights = "auto",
) -> None:
    """Write into folders what their prompts look like to the base model, from examples; the answers are not read."""
    files = named_values(data, "--data")
    for folder in files:
        if not os.path.isdir(folder):
            raise typer.BadParameter(f"{folder!r} is no folder; give the one of an adapter or mixture")
    prompts = {folder: read_prompts(Path(file), limit) for folder, file in files.items()}
    multi = MultiLoraModel.from_pretrained(model, dtype=dtype, device=device, weights=weights)
    tokenizer = multi.tokenizer
    rows = {
        folder: [prompt_tokens(tokenizer, prompt, chat=not raw) for prompt in own] for folder, own in prompts.items()
    }
    console = Console()
    with console.status("running the base model ..."):
        centroids = fit_centroids(multi.base, rows, background_tokens(tokenizer))
    for folder, centroid in centroids.items():
        write_centroid(centroid, folder)
    console.print(fitted_table(centroids))


def read_prompts(file: Path, limit: int) -> list[str | list[dict[str, str]]]:
    """What comes before each record's last answer, evenly spread over the file. Raises DatasetError."""
    records = read_records(file)
    prompts: list[str | list[dict[str, str]]] = []
    for record in records[:: max(1, len(records) // limit)][:limit]:
        if record.messages is not None:
            turns = [dict(message) for message in record.messages]
            prompts.append(turns[:-1] if turns[-1]["role"] == "assistant" else turns)
        else:
            prompts.append(record.prompt or record.text or "")
    return prompts


def fitted_table(centroids: dict[str, PromptCentroid]) -> Table:
    """How near each folder's prompts are to each other's: those that are near 1 can't be told apart."""
    table = Table(box=SIMPLE_HEAD, title="Cosine of the centroids", title_justify="left")
    table.add_column("folder")
    table.add_column("prompts", justify="right")
    for folder in centroids:
        table.add_column(Path(folder).name, justify="right")
    directions = {folder: centroid.direction / centroid.direction.norm() for folder, centroid in centroids.items()}
    for folder, centroid in centroids.items():
        cosines = [f"{float(directions[folder] @ other):.2f}" for other in directions.values()]
        table.add_row(folder, str(centroid.num_prompts), *cosines)
    return table
