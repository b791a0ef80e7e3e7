"""The command `loraplex`."""

import typer

from loraplex.cli.errors import run
from loraplex.cli.lazy import lazy_group

COMMANDS = {
    "demo": (
        "Show one batch of base, adapter, linked, residual and X-LoRA rows on a real model, with timings and quality.",
        "loraplex.cli.demo:demo",
    ),
    "generate": ("Answer prompts together, each through its own adapters.", "loraplex.cli.generate:generate"),
    "inspect": (
        "Describe an adapter: method, ranks, adapted modules, size, and the norms of its updates.",
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
        "Run the prompt once for each --adapters and --strength, and draw what each row attends to.",
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

cli = typer.Typer(cls=lazy_group(COMMANDS), no_args_is_help=True, add_completion=False)


@cli.callback()
def loraplex() -> None:
    """One frozen language model, any number of LoRA adapters, one forward pass."""


def app() -> None:
    """The entry point: an error that loraplex raises on purpose is shown without a traceback."""
    run(cli)
