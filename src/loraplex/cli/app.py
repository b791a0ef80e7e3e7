"""The command `loraplex`."""

from typing import Annotated

import typer

import loraplex as package
from loraplex.cli.errors import run
from loraplex.cli.help import make_group
from loraplex.cli.lazy import lazy_group

COMMANDS = {
    "chat": (
        "Talk to a model through adapters that you switch as you go, here or on a server.",
        "loraplex.cli.chat:chat",
    ),
    "demo": (
        "Show one batch of base, adapter, linked, residual and X-LoRA rows on a real model, with timings and quality.",
        "loraplex.cli.demo:demo",
    ),
    "generate": ("Answer prompts together, each through its own adapters.", "loraplex.cli.generate:generate"),
    "inspect": (
        "Describe an adapter, a residual, a mixture or a link: what it is made of, its size, and how strong it is.",
        "loraplex.cli.inspect:inspect",
    ),
    "convert": (
        "Convert an adapter to PEFT's format, or to GGUF: from .bin weights, MLX, GGUF, old names.",
        "loraplex.cli.convert:convert",
    ),
    "merge": (
        "Write a base model with a link's adapters in its weights, as a plain transformers model.",
        "loraplex.cli.merge:merge",
    ),
    "link": ("Write several adapters with weights as one, by PEFT's combinations.", "loraplex.cli.link:link"),
    "push": ("Upload an adapter and its model card to the Hugging Face hub, in one commit.", "loraplex.cli.push:push"),
    "auto": ("Let prompts choose their adapters: adapters=auto.", "loraplex.cli.auto:auto_app"),
    "scalings": (
        "Answer prompts through a mixture and draw the scalings of every token.",
        "loraplex.cli.scalings:scalings",
    ),
    "attention": (
        "Run the prompt once for each --adapters, --strength and --share, and draw what each row attends to.",
        "loraplex.cli.attention:attention",
    ),
    "vector": (
        "Compute a steering vector for each layer from pairs of contrasting prompts.",
        "loraplex.cli.vector:vector",
    ),
    "serve": (
        "Serve the model and its adapters over HTTP, with OpenAI's API (docs/serving.md).",
        "loraplex.cli.serve:serve",
    ),
    "key": ("Make, list and revoke API keys of `loraplex serve`.", "loraplex.cli.key:key_app"),
    "train": ("Train adapters, or mixtures of them, on a frozen base model.", "loraplex.cli.train:train_app"),
    "tune": (
        "Measure a model's linear products on this machine, and keep which are the fastest for all engines.",
        "loraplex.cli.tune:tune",
    ),
    "bench": ("Measure on this machine.", "loraplex.cli.bench:bench_app"),
}

cli = make_group(
    "One frozen language model, any number of LoRA adapters, one forward pass.",
    cls=lazy_group(COMMANDS),
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"loraplex {package.__version__}")
        raise typer.Exit


@cli.callback()
def loraplex(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version and exit.")
    ] = False,
) -> None:
    """One frozen language model, any number of LoRA adapters, one forward pass."""


def app() -> None:
    """The entry point: an error that loraplex raises on purpose is shown without a traceback."""
    run(cli)
