"""Captured attention as pictures: heads in a grid, the text in colours, residual norms, before and after."""

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, PowerNorm, TwoSlopeNorm
from matplotlib.figure import Figure

from loraplex.errors import RequestError
from loraplex.residual.capture import AttentionCapture
from loraplex.viz.scalings_text import CHAR_ASPECT, as_grid, draw_text, lay_out, text_size
from loraplex.viz.sheet import Sheet, save_figure
from loraplex.viz.style import MONO, SCALE_COLORS, text_color, tick_label

DIFFERENCE_COLORS = "RdBu_r"
_LABELS = 48  # of an axis at most
_CELL = 0.16  # inches of a token in a heatmap
_COLUMNS = 64  # characters of a line of text
_DPI = 130
_FONT_SIZE = 8 * 72 / _DPI / CHAR_ASPECT  # an advance of 8 whole pixels: hinting rounds it to whole ones anyway


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
        axes.imshow(weights[place], aspect="auto", cmap=SCALE_COLORS, norm=norm, interpolation="nearest")
        axes.set_title(name, fontsize=8)
        is_last, is_first = place >= len(names) - columns, place % columns == 0
        keys = capture.key_tokens
        _label_tokens(axes, keys, capture.query_positions, len(keys), 18, keys=is_last, queries=is_first)
    figure.colorbar(ScalarMappable(norm, SCALE_COLORS), ax=figure.axes, shrink=0.6, label="attention")
    figure.suptitle(title or f"attention of layer {layer}", fontsize=10)
    save_figure(figure, path, _DPI)


def plot_text(
    captures: Sequence[AttentionCapture], labels: Sequence[str], path: str | Path, title: str = "", skip: int = 1
) -> None:
    """Write the text once for each capture, each token coloured by the attention that it gets, beside each other.

    The attention is the mean over the captured layers, heads and queries. The first `skip` tokens are left out of the
    colour scale: models park attention on the first token.
    """
    means = [mean_attention(capture) for capture in captures]
    norm = PowerNorm(0.5, vmin=0, vmax=max(float(mean[skip:].max(initial=0)) for mean in means) or 1.0, clip=True)
    texts = [lay_out(capture.key_tokens, _COLUMNS) for capture in captures]
    num_lines = max(pieces[-1].line + 1 for pieces in texts)
    width, height = text_size(_COLUMNS, num_lines, _FONT_SIZE)
    bar = max(height, 1.2)  # room for its label
    sheet = Sheet.of_size(len(captures) * (width + 0.3) + 1.2, bar + 0.9)
    sheet.title(title or "attention over the text", left=0.2)
    for place, (label, mean, pieces) in enumerate(zip(labels, means, texts, strict=True)):
        axes = as_grid(sheet.axes(0.2 + place * (width + 0.3), 0.7, width, height), _COLUMNS, num_lines)
        axes.set_title(label, fontsize=9, loc="left", parse_math=False)
        colors = [colormaps[SCALE_COLORS](norm(value))[:3] for value in mean]
        for piece, (_, text) in zip(pieces, draw_text(axes, pieces, colors, _FONT_SIZE), strict=True):
            text.set_color(text_color(colors[piece.token]))
    sheet.bar(sheet.width - 0.85, 0.7, bar, norm, "mean attention")
    save_figure(sheet.figure, path, _DPI)


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
    tokens = [tick_label(capture.query_tokens[place]) for place in places]
    axes.set_xticks(places, tokens, rotation=90, fontsize=6, family=MONO, parse_math=False)
    figure.colorbar(image, ax=axes, label="length of the residual")
    figure.suptitle(title or "residuals by layer and token", fontsize=10)
    save_figure(figure, path, _DPI)


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
        image = axes.imshow(values, aspect="auto", cmap=SCALE_COLORS, norm=shared, interpolation="nearest")
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
    save_figure(figure, path, _DPI)


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
    labels = [tick_label(tokens[place], 10) if keys else "" for place in across]
    axes.set_xticks(across, labels, parse_math=False)
    labels = [tick_label(tokens[positions[place]], 10) if queries else "" for place in down]
    axes.set_yticks(down, labels, parse_math=False)
    axes.tick_params(axis="x", labelrotation=90, labelsize=5, length=1)
    axes.tick_params(axis="y", labelsize=5, length=1)
