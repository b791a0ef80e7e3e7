"""Pictures of scalings: whole files at any length, what is drawn where, and what is refused."""

import subprocess
import sys
import warnings
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from PIL import Image

from loraplex.errors import ConfigError, ScalingsError
from loraplex.viz.scalings_animation import animate_tokens
from loraplex.viz.scalings_plots import plot_domain_means, plot_layer_means, plot_token_heatmap
from loraplex.viz.scalings_text import lay_out, plot_text_view, token_colors
from loraplex.viz.sheet import scale_of
from loraplex.viz.style import expert_colors, limited, tick_label, visible
from tests.xlora.rows import BLOCKS, EXPERTS, LAYERS, scalings_row

ODD_TOKENS = ["", " ", "\n\n", "$x^", "$\\frac", "<|im_start|>", "尼", "\ufffd", "\u202e", "\t", "a" * 300, "_{", "%"]


def tokens(count: int) -> list[str]:
    return [f" word{index}" if index % 3 else "\n" for index in range(count)]


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        image.verify()
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


@pytest.mark.parametrize("num_tokens", [1, 7, 90])
def test_pictures_of_a_text_are_images_at_any_length(tmp_path: Path, num_tokens: int) -> None:
    row = scalings_row(num_tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_token_heatmap(row, tokens(num_tokens), tmp_path / "new" / "heat.png")
        plot_text_view(row, tokens(num_tokens), tmp_path / "text.png")
    for path in (tmp_path / "new" / "heat.png", tmp_path / "text.png"):
        height, width, _ = pixels(path).shape
        assert 200 < width < 2500
        assert 150 < height < 3000


def test_long_texts_go_on_below(tmp_path: Path) -> None:
    for num_tokens in (80, 81):
        plot_token_heatmap(scalings_row(num_tokens), tokens(num_tokens), tmp_path / f"{num_tokens}.png")
    one, two = (pixels(tmp_path / f"{num_tokens}.png").shape for num_tokens in (80, 81))
    assert two[0] > 1.6 * one[0]
    assert two[1] < 0.7 * one[1]


def test_odd_tokens_are_drawn_without_a_warning(tmp_path: Path) -> None:
    row = scalings_row(len(ODD_TOKENS))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a glyph that the font lacks
        plot_token_heatmap(row, ODD_TOKENS, tmp_path / "heat.png")
        plot_text_view(row, ODD_TOKENS, tmp_path / "text.png")
        animate_tokens(row, ODD_TOKENS, tmp_path / "text.gif")
    assert [visible(token) for token in ODD_TOKENS[:4]] == ["∅", " ", "↵↵", "$x^"]
    assert [visible("尼"), visible("\u202e"), tick_label("  "), tick_label("a" * 99)] == [
        "□",
        "□",
        "␣␣",
        "a" * 13 + "…",
    ]


def test_heatmap_has_the_colour_of_each_scaling(tmp_path: Path) -> None:
    values = torch.zeros(1, len(BLOCKS), 2)
    values[..., 0], values[..., 1] = 0.25, 1.0
    row = scalings_row(1, layers=BLOCKS, experts=("low", "high"), values=values)
    plot_token_heatmap(row, ["x"], tmp_path / "heat.png")
    image = pixels(tmp_path / "heat.png")
    for value in (0.25, 1.0):
        color = np.round(np.array(colormaps["viridis"](value)[:3]) * 255)
        share = (np.abs(image - color).max(axis=-1) <= 1).mean()
        assert share > 0.05, value


def test_layer_and_domain_means_are_images(tmp_path: Path) -> None:
    rows = [scalings_row(3, seed=1), scalings_row(4, seed=2)]
    plot_layer_means(rows[0], tmp_path / "one.png")
    plot_layer_means(rows, tmp_path / "layers.svg")
    assert (tmp_path / "layers.svg").read_text().startswith("<?xml")
    plot_domain_means({"proteins": rows, "metals & $": rows[:1]}, tmp_path / "domains.png")
    for name in ("one", "domains"):
        assert pixels(tmp_path / f"{name}.png").min() < 128 < pixels(tmp_path / f"{name}.png").max()


def test_domain_matrix_colours_its_strongest_cell_brightest(tmp_path: Path) -> None:
    values = torch.zeros(2, len(BLOCKS), 2)
    values[..., 1] = 1.0
    row = scalings_row(2, layers=BLOCKS, experts=("none", "all"), values=values)
    plot_domain_means({"d": [row]}, tmp_path / "domains.png")
    image = pixels(tmp_path / "domains.png")
    dark, bright = (np.round(np.array(colormaps["viridis"](level)[:3]) * 255) for level in (0.0, 1.0))
    places = [np.nonzero(np.abs(image - color).max(axis=-1) <= 1)[1] for color in (dark, bright)]
    assert np.median(places[0]) < np.median(places[1])  # "none" is left of "all"


def test_scale_starts_at_zero_unless_scalings_are_negative() -> None:
    assert (scale_of(torch.tensor([0.2, 0.7])).vmin, scale_of(torch.tensor([-0.5, 0.7])).vmin) == (0, -0.5)
    assert scale_of(torch.zeros(3)).vmax == 1


def test_words_are_kept_together_and_every_character_has_its_place() -> None:
    text = ["The", " sil", "k", " pro", "tein", "\n", " spins", "x" * 25]
    pieces = lay_out(text, columns=10)
    lines: dict[int, str] = {}
    for piece in pieces:
        assert piece.column == len(lines.get(piece.line, ""))
        lines[piece.line] = lines.get(piece.line, "") + piece.text
    assert list(lines.values()) == ["The silk", " protein↵", " spins", "x" * 10, "x" * 10, "x" * 5]
    assert [piece.token for piece in pieces] == [0, 1, 2, 3, 4, 5, 6, 7, 7, 7]


def test_token_has_its_strongest_experts_colour_the_paler_the_less_certain() -> None:
    values = torch.tensor([[[0.9, 0.05, 0.05]], [[0.4, 0.3, 0.3]], [[0.0, 0.0, 1.0]]])
    sure, unsure, other = token_colors(scalings_row(3, layers=("lm_head",), values=values))
    assert sum(sure) < sum(unsure)
    assert np.argmax(sure) == np.argmax(expert_colors(3)[0])
    assert np.argmax(other) == np.argmax(expert_colors(3)[2])


@pytest.mark.parametrize("num_experts", [1, 8, 9, 12, 30])
def test_experts_have_different_colours(num_experts: int) -> None:
    assert len(set(expert_colors(num_experts))) == num_experts


def test_text_beyond_the_limit_is_cut_and_says_so() -> None:
    row, shown, note = limited(scalings_row(9), tokens(9), 4)
    assert (row.num_tokens, len(shown), note) == (4, 4, "; first 4 of 9 tokens")
    assert limited(scalings_row(4), tokens(4), 4)[2] == ""


@pytest.mark.parametrize("num_tokens", [1, 6])
def test_animation_has_a_frame_for_each_token(tmp_path: Path, num_tokens: int) -> None:
    animate_tokens(scalings_row(num_tokens), tokens(num_tokens), tmp_path / "a.gif", frames_per_s=5)
    frames = []
    with Image.open(tmp_path / "a.gif") as image:
        assert (image.format, getattr(image, "n_frames", 1)) == ("GIF", num_tokens)
        for index in range(num_tokens):
            image.seek(index)
            frames.append((image.info["duration"], np.asarray(image.convert("RGB"))))
    assert [duration for duration, _ in frames] == [200] * (num_tokens - 1) + [1700]
    for (_, before), (_, after) in pairwise(frames):
        assert (before != after).any()
    assert all((frame[0, 0] == 255).all() for _, frame in frames)


def test_animation_of_sixty_tokens_is_small(tmp_path: Path) -> None:
    layers = tuple(f"model.layers.{block}.q_proj" for block in range(30))
    experts = tuple(f"expert{index}" for index in range(4))
    animate_tokens(scalings_row(60, layers=layers, experts=experts), tokens(60), tmp_path / "a.gif")
    assert (tmp_path / "a.gif").stat().st_size < 1_500_000


@pytest.mark.parametrize("draw", [plot_token_heatmap, plot_text_view])
def test_unknown_format_is_refused(tmp_path: Path, draw: object) -> None:
    assert callable(draw)
    with pytest.raises(ConfigError, match=r"suffix '\.txt'"):
        draw(scalings_row(2), tokens(2), tmp_path / "picture.txt")


@pytest.mark.parametrize(("name", "frames_per_s"), [("a.png", 4.0), ("a.gif", 0.0), ("a.gif", float("nan"))])
def test_bad_animation_options_are_refused(tmp_path: Path, name: str, frames_per_s: float) -> None:
    with pytest.raises(ConfigError, match=r"ends in \.gif"):
        animate_tokens(scalings_row(2), tokens(2), tmp_path / name, frames_per_s=frames_per_s)


def test_tokens_that_are_not_the_rows_are_refused(tmp_path: Path) -> None:
    for draw in (plot_token_heatmap, plot_text_view, animate_tokens):
        with pytest.raises(ScalingsError, match="3 texts of tokens were given for the 2 tokens"):
            draw(scalings_row(2), tokens(3), tmp_path / "a.gif")
        with pytest.raises(ScalingsError, match="2 characters"):
            draw(scalings_row(2), "ab", tmp_path / "a.gif")


def test_domains_without_scalings_or_of_other_mixtures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ScalingsError, match="all"):
        plot_domain_means({}, tmp_path / "a.png")
    with pytest.raises(ScalingsError, match="metals"):
        plot_domain_means({"proteins": [scalings_row()], "metals": []}, tmp_path / "a.png")
    with pytest.raises(ScalingsError, match="same experts"):
        plot_layer_means([scalings_row(), scalings_row(layers=LAYERS[1:])], tmp_path / "a.png")
    with pytest.raises(ScalingsError, match="same experts"):
        plot_domain_means(
            {"proteins": [scalings_row()], "metals": [scalings_row(experts=EXPERTS[:2])]}, tmp_path / "a.png"
        )


def test_pictures_need_no_display_and_leave_pyplot_alone() -> None:
    modules = "loraplex.viz.scalings_plots, loraplex.viz.scalings_text, loraplex.viz.scalings_animation"
    code = f"import sys, {modules}; assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
