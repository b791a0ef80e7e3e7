"""What commands share: options that mean the same in all of them, values of the form NAME=VALUE, and tables."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from loraplex.adapters.leftovers import is_leftover, restore_all_replaced

if TYPE_CHECKING:  # what these import takes seconds
    from loraplex.models.multi_lora import MultiLoraModel
    from loraplex.training import TrainResult

_MAX_NUMBERS = 10_000

Model = Annotated[str, typer.Option(help="Base model: smollm2-135m, a folder, or a hub id.")]
Load = Annotated[
    list[str],
    typer.Option(help="NAME=FOLDER, or hub id, of an adapter, a residual or a mixture to load; repeat."),
]
LoadAll = Annotated[Path | None, typer.Option(help="Load every adapter folder below this one, by its name.")]
LoadMixture = Annotated[list[str], typer.Option(help="NAME=FOLDER, or hub id, of a mixture to load; repeat.")]
IgnoreUnknown = Annotated[
    bool,
    typer.Option("--ignore-unknown", help="Leave out settings of adapters that are not known; the default refuses."),
]
Layers = Annotated[str | None, typer.Option(help='Attention layers, such as "10,11" or "8-15"; default all.')]
Raw = Annotated[bool, typer.Option("--raw", help="Take the prompts as they are, without chat template.")]
Dtype = Annotated[str, typer.Option(help="Dtype of the base model: float32, bfloat16, float16 or auto: its own.")]
Weights = Annotated[str, typer.Option(help="int8: linear weights in 8 bits, on a CPU in bfloat16; auto: as the dtype.")]
LinkName = Annotated[str, typer.Argument(help='Adapters and weights: "a", "a:0.7+b:0.3".')]
LinkedAdapters = Annotated[
    list[str],
    typer.Option(
        "--load", "--adapter", help="NAME=FOLDER, or hub id, of each LoRA adapter that the link names; repeat."
    ),
]
ApiKey = Annotated[
    str | None, typer.Option(envvar="OPENAI_API_KEY", show_envvar=True, help="API key, if the server wants one.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier run wrote there.")]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, ...")]


def named_values(options: Sequence[str], flag: str) -> dict[str, str]:
    """Read repeated NAME=VALUE options; a wrong or repeated one is a usage error."""
    values: dict[str, str] = {}
    for option in options:
        name, equals, value = option.partition("=")
        if not (name and equals and value):
            raise typer.BadParameter(f"{option!r} is not NAME=VALUE, for example {flag} protein=path/to/folder")
        if name in values:
            raise typer.BadParameter(f"{flag} names {name!r} twice")
        values[name] = value
    return values


def adapters_in(folder: Path) -> dict[str, Path]:
    """Every folder of a LoRA or residual adapter directly below `folder`, by its name."""
    restore_all_replaced(folder)
    found = [*folder.glob("*/adapter_config.json"), *folder.glob("*/residual_config.json")]
    return {path.parent.name: path.parent for path in sorted(found) if not is_leftover(path.parent)}


def load_adapters(model: "MultiLoraModel", load: Sequence[str]) -> None:
    """What --load names."""
    for name, folder in named_values(load, "--load").items():
        load_folder(model, name, folder)


def load_named(
    model: "MultiLoraModel",
    load: Sequence[str],
    load_all: Path | None,
    load_mixture: Sequence[str],
    *,
    ignore_unknown: bool = False,
) -> None:
    """Load what the options name; one of `load` goes before a folder of the same name."""
    folders = {} if load_all is None else {name: str(path) for name, path in adapters_in(load_all).items()}
    for name, folder in {**folders, **named_values(load, "--load")}.items():
        load_folder(model, name, folder, ignore_unknown=ignore_unknown)
    for name, folder in named_values(load_mixture, "--load-mixture").items():
        model.load_mixture(name, folder)


def load_folder(model: "MultiLoraModel", name: str, source: str, *, ignore_unknown: bool = False) -> None:
    """Load an adapter, a residual or a mixture, by what the folder holds; of the hub, an adapter."""
    from loraplex.routers.folder import is_router_folder  # imports torch
    from loraplex.xlora.formats.folders import is_mixture_folder

    folder = Path(os.path.expanduser(source))
    if is_router_folder(folder) or is_mixture_folder(folder):
        model.load_mixture(name, folder)
    else:
        model.load_adapter(name, source, ignore_unknown=ignore_unknown)


def read_numbers(text: str) -> tuple[int, ...]:
    """Those of "3", "10,11" or "8-15". Raises ValueError."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})(?:-(\d{1,9}))?\s*", part)
        if match is None or (match[2] is not None and int(match[2]) < int(match[1])):
            raise ValueError(f"{text[:100]!r} is no list of numbers; write '10,11' or '8-15'")
        span = range(int(match[1]), int(match[2] or match[1]) + 1)
        if len(span) > _MAX_NUMBERS:
            raise ValueError(f"{text[:100]!r} names too many; at most {_MAX_NUMBERS} by one span")
        found += span
    return tuple(found)


def numbers(text: str | None) -> tuple[int, ...] | None:
    """`read_numbers` of an option, each once; None stays None."""
    try:
        return None if text is None else tuple(dict.fromkeys(read_numbers(text)))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def summary_table(rows: Mapping[str, str]) -> Table:
    """Labels and values."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column()
    for label, value in rows.items():
        table.add_row(label, Text(value))
    return table


def results_table(kind: str, results: "Sequence[TrainResult]") -> Table:
    """What became of trainings."""
    table = Table(box=SIMPLE_HEAD)
    for column in (kind, "steps", "stopped by", "loss", "held-out loss", "best at step", "tokens", "folder"):
        table.add_column(column)
    for result in results:
        table.add_row(
            result.name,
            str(result.num_steps),
            result.finished,
            f"{result.train_losses[-1]:.4f}" if result.train_losses else "-",
            f"{result.eval_losses[-1]:.4f}" if result.eval_losses else "-",
            "-" if result.best_step is None else str(result.best_step),
            f"{result.num_tokens:,}",
            str(result.folder),
        )
    return table
