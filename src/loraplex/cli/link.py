"""`loraplex link`: write a link as one adapter in PEFT's format."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from loraplex.adapters.linking.combination import MAJORITY_SIGNS, METHODS, Combination
from loraplex.cli.options import LinkedAdapters, LinkName, Overwrite, named_values
from loraplex.errors import ConfigError
from loraplex.models.checkpoints.loading import DTYPES
from loraplex.models.convert.linking import save_linked


def link(
    link: LinkName,
    output: Annotated[Path, typer.Argument(help="Folder of the adapter.")],
    load: LinkedAdapters = [],  # noqa: B006
    combination: Annotated[
        str,
        typer.Option(
            help=f"How they are combined: {', '.join(METHODS)}. Only cat computes exactly what the link does."
        ),
    ] = "cat",
    rank: Annotated[
        int | None, typer.Option(help="Rank of the result, for combinations with svd; default: the largest.")
    ] = None,
    density: Annotated[
        float | None, typer.Option(help="Share of the values that are kept, for ties, dare and magnitude_prune.")
    ] = None,
    majority_sign: Annotated[
        str | None, typer.Option(help=f"{' or '.join(MAJORITY_SIGNS)}, for ties; default {MAJORITY_SIGNS[0]}.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of what dare leaves out.")] = 0,
    dtype: Annotated[str, typer.Option(help="Dtype of the file: float32, bfloat16 or float16.")] = "float32",
    overwrite: Overwrite = False,
) -> None:
    """Write several adapters with weights as one, by PEFT's combinations.

    A link such as "a:0.7+b:0.3" becomes one LoRA adapter that PEFT loads too. No base model is needed."""
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} can't be used. Use one of {list(DTYPES)}.")
    options = Combination(method=combination, rank=rank, density=density, majority_sign=majority_sign, seed=seed)
    adapters = named_values(load, "--load")
    linked = save_linked(link, output, adapters, options, dtype=DTYPES[dtype], overwrite=overwrite)
    ranks = sorted({weights.rank for weights in linked.layers.values()})
    span = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    Console(highlight=False).print(
        f"{link} by {combination}: {len(linked.layers)} modules, {span}: {output}", soft_wrap=True, markup=False
    )
