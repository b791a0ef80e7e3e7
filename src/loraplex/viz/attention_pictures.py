"""Captured attention as pictures: heads in a grid, the text in colours, residual norms, before and after."""

import math
import unicodedata
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, PowerNorm, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from loraplex.errors import RequestError
from loraplex.output_files import save_figure
from loraplex.residual.capture import AttentionCapture

COLORS = "viridis"
DIFFERENCE_COLORS = "RdBu_r"
MONO = "DejaVu Sans Mono"  # comes with matplotlib
_LABELS = 48  # of an axis at most
_CELL = 0.16  # inches of a token in a heatmap
_LINE_WIDTH = 64  # characters of a line of text
_DPI = 130
_FONT_POINTS = 8 * 72 / _DPI / 0.602  # an advance of 8 whole pixels: hinting rounds it to whole ones anyway
_CHARACTER = 8 / _DPI  # inches
_LINE = 0.17  # inches
_VISIBLE = {"\n": "↵", "\t": "→", "\r": ""}


def visible(token: str, most: int = 14) -> str:
    """A token's text for a label: line breaks as signs, no control characters, not too long."""
    shown = "".join(_VISIBLE.get(char, " " if unicodedata.category(char)[0] == "C" else char) for char in token)
    shown = (shown.strip() or "␣").replace("$", r"\$")  # matplotlib reads formulas between dollars
    return shown if len(shown) <= most else shown[: most - 1] + "…"


def plot_heads(capture: AttentionCapture, layer: int, path: str | Path, title: str = "") -> None:
    """Write one heatmap for each captured head of a layer, queries down and keys across, and their mean."""
    weights = _of_layer(capture, layer)
    names = ["mean"] if capture.heads is None else [f"head {head}" for head in capture.heads]
    if len(names) > 1:
        weights, names = np.concatenate([weights, weights.mean(axis=0, keepdims=True)]), [*names, "mean"]
    columns = min(len(names), 4)
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(0.6 + 2.6 * columns, 0.9 + 2.6 * rows), layout="constrained")
    norm = _norm(weights)
    for place, name in enumerate(names):
        axes = figure.add_subplot(rows, columns, place + 1)
        axes.imshow(weights[place], aspect="auto", cmap=COLORS, norm=norm, interpolation="nearest")
        axes.set_title(name, fontsize=8)
        few = 18
        _label(axes, capture, few, keys=place >= len(names) - columns, queries=place % columns == 0)
    figure.colorbar(ScalarMappable(norm, COLORS), ax=figure.axes, shrink=0.6, label="attention")
    figure.suptitle(title or f"attention of layer {layer}", fontsize=10)
    _save(figure, path)


def plot_text(
    captures: Sequence[AttentionCapture], labels: Sequence[str], path: str | Path, title: str = "", skip: int = 1
) -> None:
    """Write the text once for each capture, each token coloured by the attention that it gets, beside each other.

    The attention is the mean over the captured layers, heads and queries. The first `skip` tokens are left out of the
    colour scale: models park attention on the first token.
    """
    means = [mean_attention(capture) for capture in captures]
    top_value = max(float(mean[skip:].max(initial=0)) for mean in means) or 1.0
    norm = PowerNorm(0.5, vmin=0, vmax=top_value)
    lines = [_lines(capture.key_tokens) for capture in captures]
    num_lines = max(map(len, lines))
    width, height = _LINE_WIDTH * _CHARACTER, num_lines * _LINE
    figure = Figure(figsize=(len(captures) * (width + 0.3) + 1.2, height + 0.9))
    total_width, total_height = figure.get_size_inches()
    for place, (label, mean) in enumerate(zip(labels, means, strict=True)):
        own = len(lines[place]) * _LINE
        left, bottom = 0.2 + place * (width + 0.3), total_height - 0.7 - own
        axes = figure.add_axes((left / total_width, bottom / total_height, width / total_width, own / total_height))
        _draw_text(axes, captures[place].key_tokens, lines[place], mean, norm)
        axes.set_title(label, fontsize=9, loc="left")
    bar = figure.add_axes((1 - 0.85 / total_width, 0.2 / total_height, 0.12 / total_width, 1 - 0.9 / total_height))
    figure.colorbar(ScalarMappable(norm, COLORS), cax=bar, label="mean attention")
    figure.suptitle(title or "attention over the text", fontsize=10)
    _save(figure, path)


def plot_residual_norms(capture: AttentionCapture, path: str | Path, title: str = "") -> None:
    """Write a heatmap of the residuals' lengths, layers down and tokens across. Raises RequestError without any."""
    if capture.residual_norms is None:
        raise RequestError("this row has no residuals, so there are no norms to plot. Give it a link with residuals.")
    norms = capture.residual_norms
    width = max(4.0, 1.6 + _CELL * norms.shape[1])
    figure = Figure(figsize=(min(width, 30), 1.6 + 0.22 * norms.shape[0]), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(norms, aspect="auto", cmap="magma", interpolation="nearest")
    axes.set_yticks(range(len(capture.layers)), [str(layer) for layer in capture.layers], fontsize=7)
    axes.set_ylabel("layer")
    places = _every(norms.shape[1])
    tokens = [visible(capture.query_tokens[place]) for place in places]
    axes.set_xticks(places, tokens, rotation=90, fontsize=6, family=MONO)
    figure.colorbar(image, ax=axes, label="length of the residual")
    figure.suptitle(title or "residuals by layer and token", fontsize=10)
    _save(figure, path)


def plot_compared(
    before: AttentionCapture, after: AttentionCapture, path: str | Path, labels: tuple[str, str] = ("before", "after")
) -> None:
    """Write the mean attention of two captures of one text side by side, and what changed.

    Raises RequestError if the texts differ; of two generations, compare what both have: the prompt.
    """
    num_keys = _common(before.key_tokens, after.key_tokens)
    positions = [p for p in before.query_positions if p in set(after.query_positions) and p < num_keys]
    if num_keys == 0 or not positions:
        raise RequestError("the two captures have no text or no queries in common, so they can't be compared.")
    means = [_mean_map(capture, positions, num_keys) for capture in (before, after)]
    change = means[1] - means[0]
    limit = float(np.abs(change).max()) or 1.0
    figure = Figure(figsize=(13, 4.8), layout="constrained")
    shared = _norm(np.stack(means))
    for place, values in enumerate(means):
        axes = figure.add_subplot(1, 3, place + 1)
        image = axes.imshow(values, aspect="auto", cmap=COLORS, norm=shared, interpolation="nearest")
        axes.set_title(labels[place], fontsize=9)
        _label_tokens(axes, before.key_tokens, positions, num_keys, 30, queries=place == 0)
        figure.colorbar(image, ax=axes, shrink=0.6)
    axes = figure.add_subplot(1, 3, 3)
    norm = TwoSlopeNorm(0, -limit, limit)
    image = axes.imshow(change, aspect="auto", cmap=DIFFERENCE_COLORS, norm=norm, interpolation="nearest")
    axes.set_title(f"{labels[1]} - {labels[0]}", fontsize=9)
    _label_tokens(axes, before.key_tokens, positions, num_keys, 30, queries=False)
    figure.colorbar(image, ax=axes, shrink=0.6)
    figure.suptitle(f"mean attention over layers {_span(before.layers)} and their heads", fontsize=10)
    _save(figure, path)


def mean_attention(capture: AttentionCapture) -> np.ndarray:  # [keys]
    """What each token gets: the mean over layers, heads, and the queries that can see it."""
    by_query = capture.weights.astype(np.float64).mean(axis=(0, 1))  # [queries, keys]
    positions = np.array(capture.query_positions)[:, None]
    seen = positions >= np.arange(by_query.shape[1])
    return np.asarray(by_query.sum(axis=0) / np.maximum(seen.sum(axis=0), 1))


def _span(layers: Sequence[int]) -> str:
    steps = all(b == a + 1 for a, b in pairwise(layers))
    return f"{layers[0]} to {layers[-1]}" if steps and len(layers) > 2 else ", ".join(map(str, layers))


def _mean_map(capture: AttentionCapture, positions: Sequence[int], num_keys: int) -> np.ndarray:
    places = [capture.query_positions.index(position) for position in positions]
    return np.asarray(capture.weights.astype(np.float64).mean(axis=(0, 1))[places, :num_keys])


def _of_layer(capture: AttentionCapture, layer: int) -> np.ndarray:  # [heads, queries, keys]
    if layer not in capture.layers:
        raise RequestError(f"layer {layer} was not captured; captured: {list(capture.layers)}.")
    return np.asarray(capture.weights[capture.layers.index(layer)], dtype=np.float32)


def _common(one: Sequence[str], other: Sequence[str]) -> int:
    pairs = zip(one, other, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _norm(weights: np.ndarray) -> Normalize:
    """A scale on which small weights can be seen beside those that models park on the first token."""
    return PowerNorm(0.4, vmin=0, vmax=float(weights.max()) or 1.0)


def _every(count: int, most: int = _LABELS) -> list[int]:
    return list(range(0, count, max(1, math.ceil(count / most))))


def _label(axes: Axes, capture: AttentionCapture, most: int, *, keys: bool, queries: bool) -> None:
    _label_tokens(
        axes, capture.key_tokens, capture.query_positions, len(capture.key_tokens), most, keys=keys, queries=queries
    )


def _label_tokens(
    axes: Axes,
    tokens: Sequence[str],
    positions: Sequence[int],
    num_keys: int,
    most: int,
    *,
    keys: bool = True,
    queries: bool = True,
) -> None:
    across, down = _every(num_keys, most), _every(len(positions), most)
    axes.set_xticks(across, [visible(tokens[place], 10) for place in across] if keys else [""] * len(across))
    axes.set_yticks(down, [visible(tokens[positions[place]], 10) for place in down] if queries else [""] * len(down))
    axes.tick_params(axis="x", labelrotation=90, labelsize=5, length=1)
    axes.tick_params(axis="y", labelsize=5, length=1)


def _lines(tokens: Sequence[str], width: int = _LINE_WIDTH) -> list[list[int]]:
    """Which tokens stand on which line: as in the text, and no longer than `width` characters."""
    lines: list[list[int]] = [[]]
    used = 0
    for place, token in enumerate(tokens):
        size = len(_shown(token))
        if lines[-1] and used + size > width:
            lines.append([])
            used = 0
        lines[-1].append(place)
        used += size
        if "\n" in token:
            lines.append([])
            used = 0
    return [line for line in lines if line] or [[]]


def _shown(token: str) -> str:
    return "".join(_VISIBLE.get(char, char) for char in token) or "␣"


def _draw_text(axes: Axes, tokens: Sequence[str], lines: list[list[int]], mean: np.ndarray, norm: Normalize) -> None:
    """Tokens in a font of fixed width, each on its colour."""
    axes.set_xlim(0, _LINE_WIDTH)
    axes.set_ylim(len(lines), 0)
    axes.axis("off")
    scale = colormaps[COLORS]
    for row, line in enumerate(lines):
        column = 0
        for place in line:
            text = _shown(tokens[place])
            color = scale(float(norm(min(mean[place], norm.vmax or 1.0))))
            light = 0.2126 * color[0] + 0.7152 * color[1] + 0.0722 * color[2] > 0.5
            axes.add_patch(Rectangle((column, row), len(text), 0.92, color=color, linewidth=0))
            axes.text(
                *(column, row + 0.5, text.replace("$", r"\$")),
                family=MONO,
                fontsize=_FONT_POINTS,
                va="center",
                color="black" if light else "white",
            )
            column += len(text)


def _save(figure: Figure, path: str | Path) -> None:
    save_figure(figure, path, _DPI)
