"""A figure whose parts are placed in inches, so that a token's cell has one size in every picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from loraplex import output_files
from loraplex.errors import ConfigError
from loraplex.viz.style import MONO, SCALE_COLORS, expert_colors, tick_label

PANEL_TITLE = 0.26  # inches above a panel
LABEL_STEP = 0.068  # inches, a character of a token's label
_BAR_WIDTH = 0.14
_MIN_LABEL_STEP = 0.12  # between two labels on a vertical axis


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """A figure, and its size in inches."""

    figure: Figure
    width: float
    height: float

    @classmethod
    def of_size(cls, width: float, height: float) -> Self:
        return cls(figure=Figure(figsize=(width, height)), width=width, height=height)

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        """Add axes; all four in inches, from the top left."""
        bottom = self.height - top - height
        return self.figure.add_axes((left / self.width, bottom / self.height, width / self.width, height / self.height))

    def title(self, text: str, left: float) -> None:
        self.figure.text(
            left / self.width,
            1 - 0.27 / self.height,
            text,
            fontsize=12,
            verticalalignment="center",
            parse_math=False,
        )

    def bar(self, left: float, top: float, height: float, norm: Normalize, label: str) -> None:
        """Add the colour scale of the panels."""
        axes = self.axes(left, top, _BAR_WIDTH, height)
        self.figure.colorbar(ScalarMappable(norm, SCALE_COLORS), cax=axes)
        axes.set_ylabel(label, fontsize=9)
        axes.tick_params(labelsize=8)


def scale_of(values: Tensor) -> Normalize:
    """A colour scale from 0 (or the lowest, if a mixture without softmax predicts less) to the highest value."""
    lowest, highest = min(0.0, float(values.min())), float(values.max())
    return Normalize(lowest, highest if highest > lowest else lowest + 1)


def expert_title(sheet: Sheet, axes: Axes, experts: Sequence[str], expert: int, mean: float) -> None:
    """Name a panel's expert after a square in its colour, the same in all pictures."""
    place = axes.get_position()
    width, height = place.width * sheet.width, place.height * sheet.height  # inches
    square = Rectangle(
        (0, 1 + 0.06 / height), 0.1 / width, 0.1 / height, transform=axes.transAxes, clip_on=False, linewidth=0
    )
    square.set_facecolor(expert_colors(len(experts))[expert])
    axes.add_patch(square)
    axes.text(
        0.16 / width,
        1 + 0.055 / height,
        f"{experts[expert]}  (mean {mean:.3f})",
        transform=axes.transAxes,
        fontsize=9,
        parse_math=False,
    )


def label_blocks(axes: Axes, labels: Sequence[str], height: float) -> None:
    """Label a vertical axis of blocks: as many numbers as fit in `height` inches, and every name."""
    step = next(step for step in (1, 2, 5, 10, 20, 50, len(labels)) if step * height >= _MIN_LABEL_STEP * len(labels))
    named = [i for i, label in enumerate(labels) if not label.isdecimal()]
    numbers = [i for i, label in enumerate(labels) if label.isdecimal() and int(label) % step == 0]
    ticks = named + [i for i in numbers if all(abs(i - other) >= step for other in named)]
    axes.set_yticks(ticks, [labels[tick] for tick in ticks], fontsize=7, parse_math=False)
    axes.tick_params(axis="y", length=2)
    if all(label.isdecimal() for label in labels):
        axes.set_ylabel("block", fontsize=8)


def label_tokens(axes: Axes, tokens: Sequence[str], is_last: bool) -> None:
    """Write the tokens below the last panel of a line; the panels above have marks only."""
    axes.set_xticks(range(len(tokens)))
    axes.tick_params(axis="x", length=2, labelbottom=is_last)
    if is_last:
        labels = [tick_label(token) for token in tokens]
        axes.set_xticklabels(labels, rotation=90, fontsize=8, family=MONO, parse_math=False)


def save_figure(figure: Figure, path: str | Path, dpi: int = 120) -> None:
    """Write `figure` in the format of the suffix of `path`; raises ConfigError if there is no such format."""
    path = Path(path)
    formats = FigureCanvasAgg(figure).get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in formats:
        raise ConfigError(f"{path} has suffix {path.suffix!r}; supported: {sorted(formats)}. Use .png.")
    output_files.save_figure(figure, path, dpi)
