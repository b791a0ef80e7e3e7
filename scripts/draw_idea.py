"""Draw the one idea of loraplex, docs/images/idea.svg and idea.png: everything is a choice of gates.

python scripts/draw_idea.py
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.patches import Circle, FancyBboxPatch, Rectangle

IMAGES = Path(__file__).parent.parent / "docs" / "images"
WIDTH, HEIGHT = 128.0, 72.0  # drawing units, ten to the inch

INK, SOFT, LINE = "#1c2430", "#5b6675", "#c6ced8"
FROZEN = "#8793a3"
ADAPTERS = {"protein": "#2f6fde", "materials": "#e67e22", "chemistry": "#1f9d6b"}
RANKS = {"protein": 4, "materials": 3, "chemistry": 3}
ADAPTER_GAP = 1.1  # between the rank rows of one adapter and the next


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the batch: what it asks for, and the gate of each adapter at each of its tokens."""

    choice: str
    meaning: str
    gates: list[dict[str, float]]


ROWS = [
    Row(choice="None", meaning="the base model", gates=[{}] * 3),
    Row(choice='"protein"', meaning="one adapter", gates=[{"protein": 1.0}] * 3),
    Row(
        choice='"protein:0.7+materials:0.3"',
        meaning="linked adapters",
        gates=[{"protein": 0.7, "materials": 0.3}] * 4,
    ),
    Row(
        choice='"science"',
        meaning="an X-LoRA mixture: new gates\nfor every token and layer",
        gates=[
            {"protein": 0.85, "materials": 0.05, "chemistry": 0.10},
            {"protein": 0.60, "materials": 0.10, "chemistry": 0.30},
            {"protein": 0.15, "materials": 0.10, "chemistry": 0.75},
            {"protein": 0.05, "materials": 0.15, "chemistry": 0.80},
            {"protein": 0.10, "materials": 0.65, "chemistry": 0.25},
            {"protein": 0.05, "materials": 0.90, "chemistry": 0.05},
        ],
    ),
]
SHOWN = (3, 1)  # the token whose way through the layer the right half shows: row, position

CELL = 2.45  # the height of a token's line and of a rank row's lane
COLUMN = 3.1  # the width of a rank row in the grid of gates
ROW_GAP = 2.2
TOKEN_LEFT, GRID_LEFT, GRID_TOP = 32.0, 38.4, 53.6
A_LEFT, GATE_LEFT, B_LEFT, BAR, LANES_TOP = 83.0, 96.1, 101.3, 11.0, 42.5


def tint(colour: str, strength: float) -> str:
    """The colour on white, from white at 0 to itself at 1."""
    return to_hex([1 - strength * (1 - part) for part in to_rgb(colour)])


def gate_tint(adapter: str, gate: float) -> str:
    return "white" if gate == 0 else tint(ADAPTERS[adapter], 0.08 + 0.92 * gate)


def rank_offsets(step: float) -> list[tuple[str, float]]:
    """The adapter and offset of each rank row: adapters one after the other with a gap between them."""
    offsets, position = [], 0.0
    for adapter, rank in RANKS.items():
        offsets += [(adapter, position + step * index) for index in range(rank)]
        position += step * rank + ADAPTER_GAP
    return offsets


def centres(step: float) -> dict[str, float]:
    """The middle of each adapter's rank rows."""
    offsets = rank_offsets(step)
    return {
        adapter: sum(offset for name, offset in offsets if name == adapter) / rank + step / 2
        for adapter, rank in RANKS.items()
    }


def token_tops() -> list[list[float]]:
    """The upper edge of each token's line, for each row of the batch."""
    tops, top = [], GRID_TOP
    for row in ROWS:
        tops.append([top - CELL * position for position in range(len(row.gates))])
        top -= CELL * len(row.gates) + ROW_GAP
    return tops


def box(ax: Axes, x: float, y: float, width: float, height: float, *, face: str, edge: str = LINE) -> None:
    style = "round,pad=0,rounding_size=0.9"
    ax.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, fc=face, ec=edge, lw=1.1))


def cell(ax: Axes, x: float, y: float, width: float, height: float, face: str, edge: str = "white") -> None:
    ax.add_patch(Rectangle((x, y), width, height, fc=face, ec=edge, lw=0.9))


def line(ax: Axes, *points: tuple[float, float], colour: str = SOFT, width: float = 1.5) -> None:
    """A line through the points with an arrow head at its end."""
    xs, ys = zip(*points, strict=True)
    ax.plot(xs[:-1], ys[:-1], color=colour, lw=width, solid_capstyle="round", solid_joinstyle="round")
    head = {"arrowstyle": "-|>,head_width=0.28,head_length=0.5", "color": colour, "lw": width}
    ax.annotate("", points[-1], points[-2], arrowprops={**head, "shrinkA": 0, "shrinkB": 0})


def label(ax: Axes, x: float, y: float, text: str, *, size: float = 12, **style: Any) -> None:
    """Write the text with its baseline at y, centred on x unless told otherwise."""
    style = {"color": INK, "ha": "center", "va": "baseline", **style}
    ax.text(x, y, text, fontsize=size, linespacing=1.35, **style)


def frame(ax: Axes, x: float, top: float, width: float) -> None:
    """A dark frame around one token's line."""
    margin = 0.25
    size = (width + 2 * margin, CELL + 2 * margin)
    ax.add_patch(Rectangle((x - margin, top - CELL - margin), *size, fc="none", ec=INK, lw=1.8, zorder=3))


def draw_heads(ax: Axes) -> None:
    label(ax, 3.2, 66.6, "Everything is a choice of gates", size=20, weight="bold", ha="left")
    pitch = "one frozen base model, any number of adapters, one forward pass"
    label(ax, 124.5, 66.6, pitch, size=12.5, color=SOFT, ha="right")
    label(ax, 3.2, 60.2, "the rows of one batch", size=13, weight="bold", ha="left")
    label(ax, 3.2, 56.6, "adapters=[…]", size=11.5, family="monospace", color=SOFT, ha="left")
    label(ax, TOKEN_LEFT + CELL / 2, 56.6, "x[t]", size=11.5, family="monospace", color=SOFT)
    label(ax, GRID_LEFT, 60.2, "the gates of their tokens", size=13, weight="bold", ha="left")
    label(ax, A_LEFT, 60.2, "one LoRA layer, one token", size=13, weight="bold", ha="left")


def draw_batch(ax: Axes) -> None:
    """The left: what each row of the batch asks for, and its tokens."""
    for row, tops in zip(ROWS, token_tops(), strict=True):
        bottom, top = tops[-1] - CELL, tops[0]
        middle = (bottom + top) / 2
        box(ax, 2.7, bottom - 0.55, 32.6, top - bottom + 1.1, face="#f6f8fb")
        baseline = middle + 0.6 + 1.0 * row.meaning.count("\n")
        label(ax, 4.4, baseline, row.choice, size=11.5, family="monospace", ha="left")
        label(ax, 4.4, baseline - 1.3, row.meaning, size=11, color=SOFT, ha="left", va="top")
        for token_top in tops:
            cell(ax, TOKEN_LEFT, token_top - CELL, CELL, CELL, tint(FROZEN, 0.55))


def draw_gates(ax: Axes) -> None:
    """The middle: one line for each token, one column for each rank row, blank where the gate is zero."""
    offsets = rank_offsets(COLUMN)
    width = offsets[-1][1] + COLUMN
    for adapter, centre in centres(COLUMN).items():
        label(ax, GRID_LEFT + centre, 56.6, adapter, size=11, color=ADAPTERS[adapter], weight="bold")
    for row, tops in zip(ROWS, token_tops(), strict=True):
        for gates, top in zip(row.gates, tops, strict=True):
            for adapter, offset in offsets:
                face = gate_tint(adapter, gates.get(adapter, 0))
                cell(ax, GRID_LEFT + offset, top - CELL, COLUMN, CELL, face, edge="#dbe1e8")
    shown = token_tops()[SHOWN[0]][SHOWN[1]]
    frame(ax, GRID_LEFT, shown, width)
    frame(ax, TOKEN_LEFT, shown, CELL)


def draw_scale(ax: Axes) -> None:
    """Under the grid: which colour is which gate."""
    steps = (0, 0.25, 0.5, 0.75, 1)
    right = GRID_LEFT + rank_offsets(COLUMN)[-1][1] + COLUMN
    left = right - COLUMN * len(steps) - 6.8
    label(ax, left - 1.5, 3.6, "0, off", size=11, color=SOFT, ha="right")
    for index, gate in enumerate(steps):
        cell(ax, left + COLUMN * index, 3.1, COLUMN, 1.9, tint(FROZEN, gate), edge="#dbe1e8")
    label(ax, right - 5.6, 3.6, "alpha/r", size=11, color=SOFT, ha="left")


def draw_layer(ax: Axes) -> None:
    """The right: one token's way through a LoRA layer, a lane for each rank row."""
    box(ax, A_LEFT, 48.6, B_LEFT + BAR - A_LEFT, 8.6, face=tint(FROZEN, 0.30), edge=FROZEN)
    label(ax, (A_LEFT + B_LEFT + BAR) / 2, 53.2, "W", size=17, weight="bold")
    label(ax, (A_LEFT + B_LEFT + BAR) / 2, 50.3, "frozen, the same for every row", size=11, color=SOFT)
    gates = ROWS[SHOWN[0]].gates[SHOWN[1]]
    for adapter, offset in rank_offsets(CELL):
        bottom = LANES_TOP - offset - CELL
        middle = bottom + CELL / 2
        lane = gate_tint(adapter, gates.get(adapter, 0))
        ax.plot((A_LEFT + 1, GATE_LEFT + 1), (middle, middle), color=ADAPTERS[adapter], lw=1.5, zorder=0.5)
        ax.plot((GATE_LEFT + 1, B_LEFT + 1), (middle, middle), color=lane, lw=1.5, zorder=0.5)
        cell(ax, A_LEFT, bottom, BAR, CELL, tint(ADAPTERS[adapter], 0.75))
        cell(ax, GATE_LEFT, bottom, COLUMN, CELL, lane, edge=INK)
        cell(ax, B_LEFT, bottom, BAR, CELL, tint(ADAPTERS[adapter], 0.75))
    label(ax, A_LEFT + BAR / 2, LANES_TOP + 1.2, "A, stacked", size=12, weight="bold")
    label(ax, GATE_LEFT + COLUMN / 2, LANES_TOP + 1.2, "g[t]", size=12, weight="bold")
    label(ax, B_LEFT + BAR / 2, LANES_TOP + 1.2, "B, stacked", size=12, weight="bold")


def draw_wires(ax: Axes) -> None:
    lanes_bottom = LANES_TOP - rank_offsets(CELL)[-1][1] - CELL
    middle = (LANES_TOP + lanes_bottom) / 2
    entry, leave, sum_y = 79.2, 116.6, 52.9
    label(ax, entry, 46.2, "x[t]", size=12.5, family="monospace")
    line(ax, (entry, 48.8), (entry, sum_y), (A_LEFT - 0.3, sum_y))
    line(ax, (entry, 44.9), (entry, middle), (A_LEFT - 0.3, middle))
    line(ax, (B_LEFT + BAR + 0.4, sum_y), (leave - 1.6, sum_y))
    line(ax, (B_LEFT + BAR + 0.4, middle), (leave, middle), (leave, sum_y - 1.6))
    ax.add_patch(Circle((leave, sum_y), 1.5, fc="white", ec=SOFT, lw=1.5))
    label(ax, leave, sum_y - 0.95, "+", size=16)
    line(ax, (leave + 1.5, sum_y), (leave + 4.0, sum_y))
    label(ax, leave + 6.3, sum_y - 0.7, "y[t]", size=12.5, family="monospace")
    shown = token_tops()[SHOWN[0]][SHOWN[1]] - CELL / 2
    grid_right = GRID_LEFT + rank_offsets(COLUMN)[-1][1] + COLUMN + 0.35
    gate, turn, below = GATE_LEFT + COLUMN / 2, 75.8, lanes_bottom - 2.4
    path = ((grid_right, shown), (turn, shown), (turn, below), (gate, below), (gate, lanes_bottom - 0.3))
    line(ax, *path, colour=INK, width=1.8)


def draw_formula(ax: Axes) -> None:
    box(ax, 77.5, 3.0, 47.0, 6.6, face="#f6f8fb")
    formula = "y[t] = W x[t] + B (g[t] * (A x[t]))"
    label(ax, 101, 5.4, formula, size=15.5, family="monospace", weight="bold")


def main() -> None:
    plt.rcParams["svg.hashsalt"] = "loraplex"  # the same file every time
    figure = plt.figure(figsize=(WIDTH / 10, HEIGHT / 10))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))
    ax.axis("off")
    card = "round,pad=0,rounding_size=1.6"  # opaque, for pages with a dark background
    ax.add_patch(FancyBboxPatch((0.3, 0.3), WIDTH - 0.6, HEIGHT - 0.6, boxstyle=card, fc="white", ec=LINE, zorder=0))
    for draw in (draw_heads, draw_batch, draw_gates, draw_scale, draw_layer, draw_wires, draw_formula):
        draw(ax)
    IMAGES.mkdir(parents=True, exist_ok=True)
    figure.savefig(IMAGES / "idea.png", dpi=150, transparent=True)
    figure.savefig(IMAGES / "idea.svg", transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    main()
