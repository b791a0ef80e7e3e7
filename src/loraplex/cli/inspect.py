"""`loraplex inspect`: what is in an adapter's folder."""

import json as json_format
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from loraplex.adapters.inspect import AdapterReport, ModuleGroup, describe
from loraplex.cli.inspect_residual import inspect_residual
from loraplex.residual.format import is_residual_folder


def inspect(
    folder: Annotated[Path, typer.Argument(help="A LoRA adapter in PEFT's format, or a residual adapter.")],
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Describe an adapter: method, ranks, adapted modules, size, and the norms of its updates."""
    if is_residual_folder(folder):
        inspect_residual(folder, json=json)
        return
    report = describe(folder)
    if json:
        typer.echo(json_format.dumps(report.as_json(), indent=2))
    else:
        Console().print(render(report))


def render(report: AdapterReport) -> Group:
    """The report as a headed table for a terminal."""
    return Group(_summary(report), Text(), _modules(report))


def _summary(report: AdapterReport) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column()
    size = f"{report.num_parameters:,} parameters, {_bytes(report.num_bytes)} in {', '.join(report.dtypes)}"
    rows = {
        "adapter": report.name,
        "base model": report.base_model or "not recorded",
        "method": f"{report.method}{' with rsLoRA' if report.rslora else ''}",
        "rank": _span(report.min_rank, report.max_rank),
        "alpha": _numbers(report.alphas),
        "LoRA scaling": _numbers(report.scalings),
        "size": size,
        "modules": str(report.num_modules),
    }
    if report.alora_invocation_tokens is not None:
        rows["invocation tokens"] = " ".join(map(str, report.alora_invocation_tokens))
    for label, value in rows.items():
        table.add_row(label, Text(value))
    return table


def _modules(report: AdapterReport) -> Table:
    table = Table(
        box=SIMPLE_HEAD,
        caption="Frobenius norms, means over the modules; the update is scaling * B A.",
        caption_justify="left",
    )
    table.add_column("module")
    for heading in ("count", "in -> out", "rank", "|A|", "|B|", "|update|", "max"):
        table.add_column(heading, justify="right", no_wrap=True)
    for group in report.groups:
        table.add_row(*map(Text, _cells(group)))
    return table


def _cells(group: ModuleGroup) -> list[str]:
    norms = (group.norm_a.mean, group.norm_b.mean, group.norm_update.mean, group.norm_update.max)
    return [
        group.module_type,
        str(group.count),
        f"{group.in_features} -> {group.out_features}",
        _span(group.ranks[0], group.ranks[-1]),
        *(f"{norm:.3g}" for norm in norms),
    ]


def _span(low: int, high: int) -> str:
    return str(low) if low == high else f"{low} to {high}"


def _numbers(values: tuple[float, ...], most: int = 4) -> str:
    if len(values) > most:
        return f"{values[0]:.4g} to {values[-1]:.4g}"
    return ", ".join(f"{value:.4g}" for value in values)


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
