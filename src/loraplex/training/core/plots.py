"""Losses as a picture."""

import logging
from pathlib import Path

from loraplex.extras import install_command, missing_modules
from loraplex.output_files import save_figure
from loraplex.training.core.train_state import TrainState

logger = logging.getLogger(__name__)

_SMOOTHING = 0.9  # of the running mean


def plot_losses(state: TrainState, path: Path) -> None:
    """Write a PNG with the training loss, its running mean, and the held-out loss.

    A training is not lost for want of a picture: without the extra of plots a line of the log says what is missing.
    """
    if missing_modules("plots"):
        logger.warning("%s is not drawn; the log has its numbers. Pictures: %s", path, install_command("plots"))
        return
    from matplotlib.figure import Figure

    progress = state.progress
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    steps = range(1, len(progress.train_losses) + 1)
    axes.plot(steps, progress.train_losses, color="tab:blue", alpha=0.3, linewidth=1, label="training, each step")
    axes.plot(steps, running_mean(progress.train_losses), color="tab:blue", label="training, running mean")
    if progress.eval_steps:
        axes.plot(
            progress.eval_steps,
            progress.eval_losses,
            "o-",
            color="tab:orange",
            markersize=4,
            label="held out",
        )
    if state.best is not None and progress.best_step is not None:
        label = f"written: step {progress.best_step}"
        axes.axvline(progress.best_step, color="tab:gray", linestyle="--", linewidth=1, label=label)
    axes.set_title(f"{state.name}: {state.title}, learning rate {state.optimizer.config.learning_rate:g}")
    axes.set_xlabel("step")
    axes.set_ylabel("loss per answer token (nats)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path, dpi=120)


def running_mean(losses: list[float]) -> list[float]:
    """An exponential mean without the pull of a start value."""
    means: list[float] = []
    total = weight = 0.0
    for loss in losses:
        total = _SMOOTHING * total + (1 - _SMOOTHING) * loss
        weight = _SMOOTHING * weight + (1 - _SMOOTHING)
        means.append(total / weight)
    return means
