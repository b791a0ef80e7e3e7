"""Scalings token by token, as a GIF."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor

from loraplex.errors import ConfigError
from loraplex.output_files import MARK, whole_file
from loraplex.viz.scalings_text import (
    Piece,
    as_grid,
    draw_text,
    lay_out,
    legend_height,
    show_legend,
    text_size,
    token_colors,
)
from loraplex.viz.sheet import Sheet, scale_of
from loraplex.viz.style import MONO, SCALE_COLORS, expert_colors, limited, on_white, tick_label
from loraplex.xlora.scalings.row_scalings import RowScalings

_MAX_TOKENS = 240
_DPI = 90
_COLUMNS = 88
_FONT_SIZE = 9.0
_MAX_LINES = 8  # of the text; a longer one scrolls
_TOP, _GAP, _CURVES, _RIGHT = 0.7, 0.6, 1.1, 0.75  # inches, as all sizes here
_HOLD_MS = 1500  # that the last frame stays longer
_NUM_GREYS, _NUM_SCALE_COLORS = 24, 112
_PALEST_TINT = 0.08  # below it Pillow would take a tint for white
_MAX_TICKS = 15  # labelled blocks


@dataclass(frozen=True, kw_only=True)
class _Panel:
    """What changes from token to token."""

    artists: Sequence[Artist]
    show: Callable[[int], None]  # brings the artists to a token


def animate_tokens(row: RowScalings, tokens: Sequence[str], path: str | Path, *, frames_per_s: float = 4.0) -> None:
    """Write a GIF with one frame for each of the first 240 tokens.

    From the top: the token's scalings by expert and block, each expert's mean up to it, and the text up to
    it on the colours of `plot_text_view`. Raises ScalingsError if `tokens` are not the row's, and ConfigError
    for a path that doesn't end in .gif or a rate that is not within 0.1 to 50.
    """
    path = Path(path)
    if path.suffix.lower() != ".gif" or not 0.1 <= frames_per_s <= 50:
        raise ConfigError(
            f"path is {path} and frames_per_s {frames_per_s}; expected a path that ends in .gif, and 0.1 to 50."
        )
    row, tokens, note = limited(row, tokens, _MAX_TOKENS)
    sheet, panels = _scene(row, tokens, note)
    frames = _frames(sheet, panels, row)
    durations_ms = [1000 / frames_per_s] * row.num_tokens
    durations_ms[-1] += _HOLD_MS
    with whole_file(path) as temporary:
        frames[0].save(temporary, save_all=True, append_images=frames[1:], duration=durations_ms, loop=0, comment=MARK)


def _frames(sheet: Sheet, panels: Sequence[_Panel], row: RowScalings) -> list[Image.Image]:
    """One image for each token; what stays the same is drawn once."""
    artists = [artist for panel in panels for artist in panel.artists]
    for artist in artists:
        artist.set_animated(True)
    canvas = FigureCanvasAgg(sheet.figure)
    canvas.draw()
    still = canvas.copy_from_bbox(sheet.figure.bbox)
    palette = _palette(len(row.experts))
    frames = []
    for token in range(row.num_tokens):
        canvas.restore_region(still)
        for panel in panels:
            panel.show(token)
        for artist in sorted(artists, key=Artist.get_zorder):
            artist.draw(canvas.get_renderer())
        drawn = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
        frames.append(drawn.quantize(palette=palette, dither=Image.Dither.NONE))
    return frames


def _palette(num_experts: int) -> Image.Image:
    """The 256 colours of all frames: chosen for each frame alone they would flicker, and dithering would not pack."""
    greys = [(level, level, level) for level in np.linspace(0, 1, _NUM_GREYS)]
    scale = [colormaps[SCALE_COLORS](level)[:3] for level in np.linspace(0, 1, _NUM_SCALE_COLORS)]
    num_tints = (256 - len(greys) - len(scale)) // num_experts
    alphas = np.linspace(1, _PALEST_TINT, num_tints)
    tints = [on_white(color, float(alpha)) for color in expert_colors(num_experts) for alpha in alphas]
    palette = Image.new("P", (1, 1))
    palette.putpalette([round(255 * float(part)) for color in (*greys, *scale, *tints) for part in color])
    return palette


def _scene(row: RowScalings, tokens: Sequence[str], note: str) -> tuple[Sheet, list[_Panel]]:
    """One figure for all frames: from token to token, what it shows is moved or uncovered, not drawn anew."""
    pieces = lay_out(tokens, _COLUMNS)
    num_lines = min(pieces[-1].line + 1, _MAX_LINES)
    text_width, text_height = text_size(_COLUMNS, num_lines, _FONT_SIZE)
    num_experts = len(row.experts)
    panel, legend = max(0.5, 0.26 * num_experts), legend_height(num_experts) + 0.15
    left = max(0.6, 0.3 + 0.08 * max(map(len, row.experts)))
    width = max(text_width + 0.2 - left - _RIGHT, 3)
    text_top = _TOP + panel + _GAP + _CURVES + _GAP
    sheet = Sheet.of_size(max(text_width + 0.4, left + width + _RIGHT), text_top + text_height + 0.15 + legend)
    sheet.figure.set_dpi(_DPI)
    sheet.title(f"{row.mixture}: scalings token by token{note}", left=0.2)
    blocks = row.by_block()
    norm = scale_of(blocks.values)
    sheet.bar(left + width + 0.12, _TOP, panel, norm, "scaling")
    text = as_grid(sheet.axes(0.2, text_top, text_width, text_height), _COLUMNS, num_lines)
    show_legend(sheet.figure, row, 0.2, 0.1)
    return sheet, [
        _caption(sheet, tokens),
        _block_panel(sheet.axes(left, _TOP, width, panel), row.experts, blocks.labels, blocks.values.cpu(), norm),
        _curve_panel(sheet.axes(left, _TOP + panel + _GAP, width, _CURVES), row.mean_by_token().cpu()),
        _text_panel(text, pieces, row, num_lines),
    ]


def _caption(sheet: Sheet, tokens: Sequence[str]) -> _Panel:
    caption = sheet.figure.text(
        1 - 0.2 / sheet.width, 1 - 0.27 / sheet.height, "", family=MONO, parse_math=False, ha="right", va="center"
    )

    def show(token: int) -> None:
        caption.set_text(f"{token + 1:3} of {len(tokens)}: {tick_label(tokens[token]):<14}")

    return _Panel(artists=[caption], show=show)


def _block_panel(axes: Axes, experts: Sequence[str], labels: Sequence[str], values: Tensor, norm: Normalize) -> _Panel:
    """Expert by block, from `values` [tokens, blocks, experts]."""
    image = axes.imshow(values[0].T.numpy(), aspect="auto", cmap=SCALE_COLORS, norm=norm, interpolation="nearest")
    axes.set_yticks(range(len(experts)), experts, fontsize=9, parse_math=False)
    step = -(-len(labels) // _MAX_TICKS)
    ticks = [i for i, label in enumerate(labels) if not label.isdecimal() or int(label) % step == 0]
    axes.set_xticks(ticks, [labels[tick] for tick in ticks], fontsize=8, parse_math=False)
    axes.set_xlabel("block", fontsize=8, labelpad=1)
    axes.tick_params(length=2)

    def show(token: int) -> None:
        image.set_data(values[token].T.numpy())

    return _Panel(artists=[image], show=show)


def _curve_panel(axes: Axes, means: Tensor) -> _Panel:
    """Each expert's mean over LoRA layers, [tokens, experts], uncovered up to the token."""
    num_tokens, num_experts = means.shape
    curves = [axes.plot([], [], color=color, linewidth=1.5)[0] for color in expert_colors(num_experts)]
    heads = [axes.plot([], [], "o", color=color, markersize=4)[0] for color in expert_colors(num_experts)]
    cursor = axes.axvline(1, color="0.7", linewidth=0.8, zorder=0)
    axes.set_xlim(0.5, num_tokens + 0.5)
    axes.set_ylim(min(0.0, float(means.min())), max(float(means.max()) * 1.05, 1e-3))
    axes.set_xlabel("token", fontsize=8, labelpad=1)
    axes.set_ylabel("mean scaling", fontsize=8)
    axes.tick_params(length=2, labelsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    places = list(range(1, num_tokens + 1))

    def show(token: int) -> None:
        for curve, head, values in zip(curves, heads, means.T.tolist(), strict=True):
            curve.set_data(places[: token + 1], values[: token + 1])
            head.set_data([token + 1], [values[token]])
        cursor.set_xdata([token + 1])

    return _Panel(artists=[cursor, *curves, *heads], show=show)


def _text_panel(axes: Axes, pieces: Sequence[Piece], row: RowScalings, num_lines: int) -> _Panel:
    """The text up to the token, which has a frame; the lines scroll once they fill the panel."""
    artists = draw_text(axes, pieces, token_colors(row), _FONT_SIZE)

    def show(token: int) -> None:
        last_line = max(piece.line for piece in pieces if piece.token == token)
        first = max(0, last_line + 1 - num_lines)
        axes.set_ylim(first + num_lines, first)
        for piece, (box, text) in zip(pieces, artists, strict=True):
            for artist in (box, text):
                artist.set_visible(piece.token <= token and piece.line >= first)
            text.set_fontweight("bold" if piece.token == token else "normal")
            _frame(box, piece.token == token)

    return _Panel(artists=[artist for pair in artists for artist in pair], show=show)


def _frame(box: Rectangle, is_current: bool) -> None:
    box.set(edgecolor="black" if is_current else "white", linewidth=1.6 if is_current else 0.8)
    box.set_zorder(1.5 if is_current else 1)
