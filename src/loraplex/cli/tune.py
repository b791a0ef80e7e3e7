"""`loraplex tune`: measure which linear products are the fastest on this machine, and keep that for all engines."""

from collections.abc import Mapping

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from loraplex.cli.options import Dtype, Model
from loraplex.engine.config import EngineConfig
from loraplex.engine.startup.start import start_model_runner
from loraplex.engine.worker.fusion.linear_products import linear_shapes
from loraplex.kernels.dispatch import native_runs
from loraplex.kernels.product_times import TOKENS, LinearShape, ProductTimes
from loraplex.kernels.tuning import choose, forget_numbers, is_measured, tuning_file
from loraplex.kernels.tuning import tune as tune_products
from loraplex.models.multi_lora import MultiLoraModel


def tune(model: Model = "smollm2-135m", dtype: Dtype = "auto") -> None:
    """Measure a model's linear products on this machine, and keep which are the fastest for all engines.

    An engine does it when it starts with a model for the first time. Nothing else may work on the machine meanwhile.
    """
    multi = MultiLoraModel.from_pretrained(model, dtype=dtype)
    if not native_runs(multi.base.device, multi.dtype):
        typer.echo(f"Nothing to measure: {multi.dtype} on {multi.base.device} has one product only.")
        raise typer.Exit
    shapes = [shape for shape in linear_shapes(multi.base) if shape.dtype == multi.dtype and is_measured(shape)]
    shapes = sorted(set(shapes), key=str)
    forget_numbers()
    times = tune_products(shapes, anew=True)
    if len(times) < len(shapes):
        typer.echo("Not measured: others work on this machine. Try again when it is idle.", err=True)
        raise typer.Exit(1)
    runner = start_model_runner(multi, EngineConfig())
    step_tokens = runner.config.max_step_tokens
    runner.close()
    console = Console()
    console.print("GFLOP/s by the number of tokens\n")
    console.print(product_tables(times))
    console.print(f"Passes that read prompts have {step_tokens} tokens (max_step_tokens).")
    console.print(Text(f"Kept in {tuning_file()}"), soft_wrap=True)


def product_tables(times: Mapping[LinearShape, ProductTimes]) -> Group:
    """For each shape, GFLOP/s of each product by the number of tokens; the fastest are bold."""
    return Group(*(_table(shape, of_shape) for shape, of_shape in times.items()))


def _table(shape: LinearShape, times: ProductTimes) -> Table:
    title = f"{shape}: {_chosen(times)}"
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left", title_style="cyan", padding=(0, 1, 0, 0))
    table.add_column("tokens", no_wrap=True)
    for tokens in TOKENS:
        table.add_column(str(tokens), justify="right", min_width=4)
    best = [min(column) for column in zip(*times.values(), strict=True)]
    for product, seconds in times.items():
        table.add_row(product, *(_speed(shape, *cell) for cell in zip(TOKENS, seconds, best, strict=True)))
    return table


def _chosen(times: ProductTimes) -> str:
    choice = choose(times)
    if choice.is_packed:
        return "packed"
    if choice.max_compiled_tokens > TOKENS[-1]:
        return "compiled"
    return f"compiled up to {choice.max_compiled_tokens} tokens" if choice.max_compiled_tokens else "torch"


def _speed(shape: LinearShape, tokens: int, seconds: float, best: float) -> Text:
    rate = 2e-9 * tokens * shape.out_features * shape.in_features / seconds
    return Text(f"{rate:.0f}", style="bold" if seconds == best else "")
