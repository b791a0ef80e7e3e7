"""Options of how answers are chosen, which `generate` and `chat` share."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer

# By the names of SamplingParams, how a text is read where it is no option of a command; beside them "stop", a list.
READERS: Mapping[str, Callable[[str], Any]] = {
    "max_tokens": int,
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "repetition_penalty": float,
    "seed": int,
}

MaxTokens = Annotated[int, typer.Option(min=1, help="New tokens of an answer at most.")]
Temperature = Annotated[
    float | None,
    typer.Option(min=0.0, help="0 always takes the likeliest token. By default the model's generation_config, else 1."),
]
TopP = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        max=1.0,
        help="Sample among the likeliest tokens that have this probability together. By default the "
        "model's, else 1: among all.",
    ),
]
TopK = Annotated[
    int | None,
    typer.Option(min=0, help="Sample among so many of the likeliest tokens. By default the model's, else 0: all."),
]
MinP = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        max=1.0,
        help="Leave out tokens below this share of the likeliest one's probability. By default the model's, else 0.",
    ),
]
SamplingSeed = Annotated[
    int | None, typer.Option(min=0, help="Seed of sampling: the same one gives the same answers. By default random.")
]
Stop = Annotated[list[str], typer.Option(help="End an answer before this text; repeat.")]
System = Annotated[str | None, typer.Option(help="System message before the prompt: what the model is told first.")]


def given_sampling(**options: Any) -> dict[str, Any]:
    """The options that were given; the model's defaults stand in for the others."""
    return {name: value for name, value in options.items() if value is not None and value != []}
