"""What training has come to, as a table for a terminal."""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from loraplex.training import TrainResult


def render(results: Sequence[TrainResult], kind: str) -> Table:
    """A row for each result; `kind` (adapter, mixture) heads the names."""
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
