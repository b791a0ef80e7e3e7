"""`loraplex convert`: an adapter in another format as a PEFT folder, or as a GGUF file for llama.cpp; residuals too."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from loraplex.cli.options import IgnoreUnknown
from loraplex.models.checkpoints.loading import DTYPES
from loraplex.models.convert.conversion import convert_to_gguf, convert_to_peft, read_model_type
from loraplex.residual.conversion import convert_residual, is_convertible


class Format(StrEnum):
    PEFT = "peft"
    GGUF = "gguf"


def convert(
    source: Annotated[
        Path,
        typer.Argument(help="Folder with .bin weights, an MLX adapter, old names or pyreft's files; or a GGUF file."),
    ],
    output: Annotated[
        Path | None, typer.Argument(help="What to write; it must not exist. Default: beside the source.")
    ] = None,
    to: Annotated[
        Format, typer.Option(help="peft: a folder with safetensors; gguf: a file for llama.cpp.")
    ] = Format.PEFT,
    base: Annotated[
        str | None,
        typer.Option(help="Base model, a folder or a hub id, of which only the config is read. GGUF needs it."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Dtype of the factors: float32, bfloat16 or float16; default as is.")
    ] = None,
    scale: Annotated[
        float | None, typer.Option(help="Scale of an MLX adapter, where its settings leave it open.")
    ] = None,
    positions: Annotated[
        str | None,
        typer.Option(help="Positions of pyreft's interventions, which were trained there: f7+l7, l1, prompt or all."),
    ] = None,
    ignore_unknown: IgnoreUnknown = False,
) -> None:
    """Convert an adapter to PEFT's format, or to GGUF: from .bin weights, MLX, GGUF, old names.

    Residuals go to loraplex's own folders, and vectors to GGUF: from pyreft's folders and control vectors.
    """
    if dtype is not None and (dtype not in DTYPES or to is Format.GGUF):
        raise typer.BadParameter(f"--dtype is one of {', '.join(DTYPES)}, with --to peft; GGUF files get float32")
    if is_convertible(source):
        target = output or default_output(source, to, "residual")
        model_type = None if base is None else read_model_type(base)
        convert_residual(source, target, to_gguf=to is Format.GGUF, positions=positions, model_type=model_type)
        Console(highlight=False).print(f"residual: {target}", soft_wrap=True)
        return
    if positions is not None:
        raise typer.BadParameter("--positions are for interventions of pyreft")
    target = output or default_output(source, to)
    if to is Format.GGUF:
        adapter = convert_to_gguf(source, target, base=base, scale=scale, ignore_unknown=ignore_unknown)
    else:
        as_dtype = None if dtype is None else DTYPES[dtype]
        adapter = convert_to_peft(source, target, base=base, dtype=as_dtype, scale=scale, ignore_unknown=ignore_unknown)
    Console(highlight=False).print(f"{len(adapter.layers)} modules: {target}", soft_wrap=True)


def default_output(source: Path, to: Format, kind: str = "peft") -> Path:
    """A path beside the source: NAME-peft, NAME-residual or NAME.gguf."""
    resolved = source.resolve()
    name = resolved.stem if resolved.is_file() else resolved.name
    return resolved.with_name(f"{name}.gguf" if to is Format.GGUF else f"{name}-{kind}")
