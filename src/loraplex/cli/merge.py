"""`loraplex merge`: write a base model with adapters in its weights."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from loraplex.cli.options import Dtype, LinkedAdapters, LinkName, Overwrite, named_values
from loraplex.models.convert.merging import save_merged


def merge(
    base: Annotated[str, typer.Argument(help="Base model: smollm2-135m, a folder, or a hub id; not a quantized one.")],
    link: LinkName,
    output: Annotated[Path, typer.Argument(help="Folder of the merged model.")],
    load: LinkedAdapters = [],  # noqa: B006
    dtype: Dtype = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Write a base model with a link's adapters in its weights, as a plain transformers model."""
    record = save_merged(base, link, output, named_values(load, "--load"), dtype=dtype, overwrite=overwrite)
    shares = " + ".join(f"{weight:g} * {name}" for name, weight in record.link)
    Console(highlight=False).print(f"{base} + {shares}: {output}", soft_wrap=True, markup=False)
