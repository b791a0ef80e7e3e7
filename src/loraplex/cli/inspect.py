"""`loraplex inspect`: what is in the folder of an adapter, a residual or a mixture, and what a link comes to."""

import json as json_format
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from loraplex.adapters.inspect import AdapterReport, ModuleGroup, describe
from loraplex.cli.inspect_composite import render_composite
from loraplex.cli.options import IgnoreUnknown, LinkedAdapters, named_values, summary_table
from loraplex.models.mixture_report import CompositeReport, describe_link, describe_mixture
from loraplex.residual.report import ResidualLayerReport, ResidualReport, describe_residual
from loraplex.residual.sources import is_residual_source
from loraplex.routers.folder import is_router_folder
from loraplex.validation import listed
from loraplex.xlora.formats.folders import is_mixture_folder


def inspect(
    folder: Annotated[
        str,
        typer.Argument(
            help='Folder of an adapter, a residual (or its .gguf) or a mixture; with --load a link: "a+b:0.3".'
        ),
    ],
    load: LinkedAdapters = [],  # noqa: B006
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    ignore_unknown: IgnoreUnknown = False,
) -> None:
    """Describe an adapter, a residual, a mixture or a link: what it is made of, its size, and how strong it is."""
    report = _describe(folder, named_values(load, "--load"), ignore_unknown=ignore_unknown)
    if json:
        typer.echo(json_format.dumps(report.as_json(), indent=2))
    elif isinstance(report, CompositeReport):
        Console().print(render_composite(report))
    else:
        Console().print(render_residual(report) if isinstance(report, ResidualReport) else render(report))


def _describe(
    source: str, link_adapters: Mapping[str, str], *, ignore_unknown: bool
) -> AdapterReport | ResidualReport | CompositeReport:
    if link_adapters:
        return describe_link(source, link_adapters)
    folder = Path(source)
    if is_residual_source(folder):
        return describe_residual(folder)
    if is_router_folder(folder) or is_mixture_folder(folder):
        return describe_mixture(folder, ignore_unknown=ignore_unknown)
    return describe(folder, ignore_unknown=ignore_unknown)


def render(report: AdapterReport) -> Group:
    """The report as a headed table for a terminal."""
    return Group(_summary(report), Text(), _modules(report))


def _summary(report: AdapterReport) -> Table:
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
    if report.own_weights:
        rows["own weights of"] = listed(report.own_weights)
    return summary_table(rows)


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
        f"{f'{group.num_experts} x ' if group.num_experts > 1 else ''}{group.in_features} -> {group.out_features}",
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


def render_residual(report: ResidualReport) -> Group:
    """The report as a headed table for a terminal."""
    rows = {
        "adapter": report.name,
        "base model": f"{report.base_architecture or 'not recorded'} ({report.base_model or 'name not recorded'})",
        "kind": report.kind,
        "size": f"{report.num_parameters:,} parameters, {report.num_bytes:,} bytes in {', '.join(report.dtypes)}",
        "layers": str(len(report.layers)),
    }
    if report.r is not None:
        rows |= {"rank": str(report.r)}
    if report.alpha is not None:
        rows |= {"alpha": f"{report.alpha:g}"}
    return Group(summary_table(rows), Text(), _layers(report))


def _layers(report: ResidualReport) -> Table:
    is_linked = report.alpha is not None
    caption = "|update|: Frobenius norm of alpha/r * B A. Evenness of heads: 1 is all alike, 0 is one alone."
    table = Table(box=SIMPLE_HEAD, caption=caption if is_linked else None, caption_justify="left")
    table.add_column("layer", justify="right")
    if not is_linked:
        for heading in ("length", "acts on", "positions"):
            table.add_column(heading, justify="right")
    else:
        for heading in ("|update|", "top head", "its weight", "evenness of heads"):
            table.add_column(heading, justify="right", no_wrap=True)
    for layer in report.layers:
        table.add_row(*map(Text, _layer_cells(layer)))
    return table


def _layer_cells(layer: ResidualLayerReport) -> list[str]:
    cells = [str(layer.layer), f"{layer.norm:.3g}"]
    if layer.top_head is None:
        cells += [layer.site, layer.positions]
    else:
        cells += [str(layer.top_head), f"{layer.top_head_weight:.2f}", f"{layer.head_entropy:.2f}"]
    return cells
