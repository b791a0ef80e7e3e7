"""What `loraplex inspect` shows of a residual adapter."""

import json as json_format
from pathlib import Path

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from loraplex.residual.report import ResidualLayerReport, ResidualReport, describe_residual


def inspect_residual(folder: Path, *, json: bool) -> None:
    """Describe a residual adapter: kind, rank, size, and by layer how strong it is and which heads it listens to."""
    report = describe_residual(folder)
    if json:
        typer.echo(json_format.dumps(report.as_json(), indent=2))
    else:
        Console().print(render(report))


def render(report: ResidualReport) -> Group:
    """The report as a headed table for a terminal."""
    summary = Table.grid(padding=(0, 2))
    summary.add_column(style="dim")
    summary.add_column()
    rows = {
        "adapter": report.name,
        "base model": f"{report.base_architecture} ({report.base_model or 'name not recorded'})",
        "kind": report.kind,
        "size": f"{report.num_parameters:,} parameters, {report.num_bytes:,} bytes in {', '.join(report.dtypes)}",
        "layers": str(len(report.layers)),
    }
    if report.r is not None:
        rows |= {"rank": str(report.r), "alpha": f"{report.alpha:g}"}
    for label, value in rows.items():
        summary.add_row(label, Text(value))
    return Group(summary, Text(), _layers(report))


def _layers(report: ResidualReport) -> Table:
    caption = "|update|: Frobenius norm of alpha/r * B A. Evenness of heads: 1 is all alike, 0 is one alone."
    table = Table(box=SIMPLE_HEAD, caption=caption if report.r is not None else None, caption_justify="left")
    table.add_column("layer", justify="right")
    if report.r is None:
        table.add_column("length", justify="right")
    else:
        for heading in ("|update|", "top head", "its weight", "evenness of heads"):
            table.add_column(heading, justify="right", no_wrap=True)
    for layer in report.layers:
        table.add_row(*map(Text, _cells(layer)))
    return table


def _cells(layer: ResidualLayerReport) -> list[str]:
    cells = [str(layer.layer), f"{layer.norm:.3g}"]
    if layer.top_head is not None:
        cells += [str(layer.top_head), f"{layer.top_head_weight:.2f}", f"{layer.head_entropy:.2f}"]
    return cells
