"""What the pictures of scalings share: colours, and tokens as labels."""

import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

from matplotlib import colormaps
from matplotlib.colors import to_rgb
from matplotlib.font_manager import findfont, get_font

from loraplex.errors import ScalingsError
from loraplex.xlora.scalings.row_scalings import RowScalings

MONO = "DejaVu Sans Mono"  # comes with matplotlib, so that a character's width is known everywhere
SCALE_COLORS = "viridis"
MISSING_COLOR = "0.88"  # no expert adapts this module

Color = tuple[float, float, float]

# The colour-blind tell them apart: Okabe and Ito's palette, and CARTO's Safe for more experts.
_EIGHT_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#777777")
_TWELVE_COLORS = (
    *("#88CCEE", "#CC6677", "#DDCC77", "#117733", "#332288", "#AA4499"),
    *("#44AA99", "#999933", "#882255", "#661100", "#6699CC", "#888888"),
)
_VISIBLE = {"\n": "↵", "\t": "→", "\r": "", " ": " "}


def expert_colors(num_experts: int) -> list[Color]:
    """One colour for each expert, in head order."""
    for colors in (_EIGHT_COLORS, _TWELVE_COLORS):
        if num_experts <= len(colors):
            return [to_rgb(color) for color in colors[:num_experts]]
    wheel = colormaps["turbo"]
    return [to_rgb(wheel(index / (num_experts - 1))) for index in range(num_experts)]


def on_white(color: Color, alpha: float) -> Color:
    """`color` at opacity `alpha` over white."""
    red, green, blue = (1 - alpha * (1 - part) for part in color)
    return red, green, blue


def text_color(background: Color) -> str:
    """Black or white, whichever can be read on `background` (relative luminance of ITU-R BT.709)."""
    red, green, blue = background
    return "black" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.5 else "white"


def visible(token: str) -> str:
    """A token's text with line breaks and tabs as signs, and a box for what the font can't draw."""
    shown = "".join(_VISIBLE.get(char, char if _is_drawable(char) else "□") for char in token)
    return shown or "∅"


def tick_label(token: str, most: int = 14) -> str:
    """A token's text without the space before it, cut to `most` characters; spaces alone stay visible."""
    shown = visible(token)
    shown = shown.strip(" ") or "␣" * min(len(shown), most)
    return shown if len(shown) <= most else shown[: most - 1] + "…"


def limited(row: RowScalings, tokens: Sequence[str], most: int) -> tuple[RowScalings, list[str], str]:
    """The first `most` tokens of a row, and a note for the title that says so (empty if all are shown).

    Raises ScalingsError if `tokens` are not the row's.
    """
    if isinstance(tokens, str) or len(tokens) != row.num_tokens:
        raise ScalingsError(
            f"{len(tokens)} {'characters' if isinstance(tokens, str) else 'texts of tokens'} were given for the "
            f"{row.num_tokens} tokens of the scalings of {row.mixture!r}. Pass one text for each token: "
            "[tokenizer.decode([i]) for i in row.token_ids]."
        )
    if row.num_tokens <= most:
        return row, list(tokens), ""
    first = replace(row, token_ids=row.token_ids[:most], values=row.values[:most])
    return first, list(tokens[:most]), f"; first {most} of {row.num_tokens} tokens"


def _is_drawable(char: str) -> bool:
    return not unicodedata.category(char).startswith(("C", "Z")) and ord(char) in _glyphs()


@cache
def _glyphs() -> frozenset[int]:
    return frozenset(get_font(findfont(MONO)).get_charmap())
