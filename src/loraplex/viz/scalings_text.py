"""A text with every token on the colour of its strongest expert."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.text import Text

from loraplex.viz.sheet import Sheet, save_figure
from loraplex.viz.style import MONO, Color, expert_colors, limited, on_white, visible
from loraplex.xlora.scalings.row_scalings import RowScalings

CHAR_ASPECT = 0.602  # a character's width in DejaVu Sans Mono, in font sizes
LINE_HEIGHT = 1.7  # in font sizes
_POINTS = 72  # in an inch

_COLUMNS = 92
_FONT_SIZE = 10.0
_MAX_TOKENS = 1000
_LEGEND_COLUMNS = 3
_PALEST, _STRONGEST = 0.12, 0.75  # opacity; black text can be read on all of it


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A token's text, or a part of it, in a grid of characters."""

    token: int
    line: int
    column: int
    text: str


def lay_out(tokens: Sequence[str], columns: int) -> list[Piece]:
    """Fill lines of `columns` characters: break between words, after a line break, and in words too long for a line."""
    pieces: list[Piece] = []
    line = column = 0
    for index, token in enumerate(tokens):
        text = visible(token)
        rest_of_word = takewhile(lambda other: not other[:1].isspace(), tokens[index + 1 : index + 1 + columns])
        word = len(text) + sum(len(visible(other)) for other in rest_of_word)
        is_start = index == 0 or text.startswith(" ") or pieces[-1].text.endswith((" ", "↵"))
        is_word_that_fits_below = is_start and columns - column < word <= columns
        if column and (is_word_that_fits_below or column + len(text) > columns):
            line, column = line + 1, 0
        while text:
            part, text = text[: columns - column], text[columns - column :]
            pieces.append(Piece(token=index, line=line, column=column, text=part))
            line, column = (line + 1, 0) if text else (line, column + len(part))
        if "\n" in token:
            line, column = line + 1, 0
    return pieces


def token_colors(row: RowScalings) -> list[Color]:
    """Each token's colour: its strongest expert's, the paler the closer that is to 1 / experts."""
    colors = expert_colors(len(row.experts))
    lowest, highest = strength_range(row)
    strengths = row.mean_by_token().max(dim=-1).values.tolist()
    return [
        on_white(colors[expert], _PALEST + (_STRONGEST - _PALEST) * (strength - lowest) / max(highest - lowest, 1e-6))
        for expert, strength in zip(row.strongest().tolist(), strengths, strict=True)
    ]


def strength_range(row: RowScalings) -> tuple[float, float]:
    """The mean scalings that the palest and the strongest colour stand for."""
    strengths = row.mean_by_token().max(dim=-1).values
    return min(1 / len(row.experts), float(strengths.min())), float(strengths.max())


def draw_text(
    axes: Axes, pieces: Sequence[Piece], colors: Sequence[Color], font_size: float
) -> list[tuple[Rectangle, Text]]:
    """Draw pieces in axes whose units are characters and lines; return each piece's background and text."""
    artists = []
    for piece in pieces:
        place, width, height = (piece.column, piece.line + 0.07), len(piece.text), 0.86
        box = Rectangle(place, width, height, facecolor=colors[piece.token], edgecolor="white", linewidth=0.8)
        indent = len(piece.text) - len(piece.text.lstrip(" "))
        text = axes.text(
            piece.column + indent,
            piece.line + 0.5,
            piece.text.strip(" "),
            family=MONO,
            fontsize=font_size,
            verticalalignment="center_baseline",
            parse_math=False,  # a text's dollar signs are its own
            clip_on=True,
        )
        axes.add_patch(box)
        artists.append((box, text))
    return artists


def as_grid(axes: Axes, columns: int, num_lines: int) -> Axes:
    """Set the units to characters and lines, line 0 at the top."""
    axes.set_xlim(0, columns)
    axes.set_ylim(num_lines, 0)
    axes.set_axis_off()
    return axes


def text_size(columns: int, num_lines: int, font_size: float) -> tuple[float, float]:
    """Width and height in inches."""
    return columns * CHAR_ASPECT * font_size / _POINTS, num_lines * LINE_HEIGHT * font_size / _POINTS


def expert_legend(row: RowScalings) -> list[Patch]:
    """A patch for each expert, labelled with how many tokens it is the strongest for."""
    counts = row.strongest().bincount(minlength=len(row.experts)).tolist()
    colors = expert_colors(len(row.experts))
    return [
        Patch(facecolor=on_white(color, _STRONGEST), label=f"{expert} ({count} of {row.num_tokens} tokens)")
        for expert, count, color in zip(row.experts, counts, colors, strict=True)
    ]


def show_legend(figure: Figure, row: RowScalings, left: float, bottom: float) -> None:
    """Say what the colours mean, from (left, bottom) on, in inches; `legend_height` is what it takes."""
    lowest, highest = strength_range(row)
    handles = expert_legend(row)
    width, height = figure.get_size_inches()
    legend = figure.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(left / width, bottom / height),
        borderaxespad=0,
        ncols=-(-len(handles) // _legend_lines(len(handles))),
        fontsize=9,
        frameon=False,
        title=f"colour: strongest expert; pale to full: its mean scaling, {lowest:.2f} to {highest:.2f}",
        title_fontsize=9,
        alignment="left",
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def legend_height(num_experts: int) -> float:
    """In inches."""
    return 0.38 + 0.2 * _legend_lines(num_experts)


def _legend_lines(num_experts: int) -> int:
    return -(-num_experts // _LEGEND_COLUMNS)


def plot_text_view(row: RowScalings, tokens: Sequence[str], path: str | Path) -> None:
    """Write the text as a picture, each token on the colour of the expert with the largest mean over LoRA layers.

    Raises ScalingsError if `tokens` are not the row's.
    """
    row, tokens, note = limited(row, tokens, _MAX_TOKENS)
    pieces = lay_out(tokens, _COLUMNS)
    num_lines = pieces[-1].line + 1
    width, height = text_size(_COLUMNS, num_lines, _FONT_SIZE)
    below = legend_height(len(row.experts)) + 0.1
    sheet = Sheet.of_size(width + 0.4, 0.55 + height + 0.1 + below)
    sheet.title(f"{row.mixture}: the strongest expert of each token{note}", left=0.2)
    axes = sheet.axes(0.2, 0.55, width, height)
    draw_text(as_grid(axes, _COLUMNS, num_lines), pieces, token_colors(row), _FONT_SIZE)
    show_legend(sheet.figure, row, 0.2, 0.1)
    save_figure(sheet.figure, path)
