"""What `loraplex inspect` shows of mixtures and links."""

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from loraplex.cli.options import summary_table
from loraplex.models.mixture_report import CompositeReport, PartReport

_CAPTION = "|update|: Frobenius norm of alpha/r * B A over all modules."
_MAX_COLUMNS = 8  # of cosines: more don't fit into 80 columns


def render_composite(report: CompositeReport) -> Group:
    """The report as headed tables for a terminal."""
    is_link = report.kind == "link"
    rows = {"link" if is_link else "mixture": report.name, "base model": report.base_model or "not recorded"}
    if is_link:
        ranks = [part.adapter.max_rank for part in report.parts if part.adapter is not None]
        rows |= {"rank": f"{sum(ranks)} in all", "|update|": f"{report.norm:.4g}"}
    else:
        rows |= {"kind": report.kind, "experts": str(len(report.parts))}
        if report.num_parameters:
            layers = "" if report.num_layers is None else f", for {report.num_layers} LoRA layers"
            rows["router" if "router" in report.kind else "head"] = f"{report.num_parameters:,} parameters{layers}"
    shown: list[RenderableType] = [summary_table(rows), Text()]
    if report.settings:
        shown += [Text("settings", style="dim"), _settings(report), Text()]
    shown.append(_parts(report, is_link))
    if report.cosines and len(report.cosines) > 1:
        shown.append(_cosines(report))
    return Group(*shown)


def _settings(report: CompositeReport) -> Table:
    table = Table.grid(padding=(0, 2))
    for name, value in report.settings.items():
        text = str(value)
        table.add_row(Text(f"  {name}"), Text(text if len(text) <= 40 else f"{text[:37]}..."))
    return table


def _parts(report: CompositeReport, is_link: bool) -> Table:
    table = Table(box=SIMPLE_HEAD, caption=_CAPTION, caption_justify="left")
    table.add_column("adapter" if is_link else "expert")
    for heading in (*(["weight"] if is_link else []), "method", "rank", "modules", "parameters", "|update|"):
        table.add_column(heading, justify="right", no_wrap=True)
    for part in report.parts:
        table.add_row(*map(Text, _cells(part, is_link)))
    return table


def _cells(part: PartReport, is_link: bool) -> list[str]:
    cells = [part.name, *([f"{part.weight:g}"] if is_link else [])]
    adapter = part.adapter
    if adapter is None:
        return [*cells, "not here", "", "", "", ""]
    rank = (
        str(adapter.max_rank) if adapter.min_rank == adapter.max_rank else f"{adapter.min_rank} to {adapter.max_rank}"
    )
    numbers = [rank, str(adapter.num_modules), f"{adapter.num_parameters:,}"]
    return [*cells, adapter.method, *numbers, "" if part.norm is None else f"{part.norm:.4g}"]


def _cosines(report: CompositeReport) -> Table:
    names = [part.name for part in report.parts]
    caption = "1: one direction, 0: nothing in common"
    table = Table(box=SIMPLE_HEAD, title="Cosines between updates", title_justify="left", caption=caption)
    table.caption_justify = "left"
    table.add_column("")
    for name in names[:_MAX_COLUMNS]:
        table.add_column(Text(name), justify="right")
    for name, row in zip(names, report.cosines, strict=True):
        table.add_row(Text(name), *(f"{value:.3f}" for value in row[:_MAX_COLUMNS]))
    return table
