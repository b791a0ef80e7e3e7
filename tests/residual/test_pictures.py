"""Pictures and pages of captures: written, and refused where there is nothing to show."""

import base64
import json
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from loraplex.errors import RequestError
from loraplex.residual.capture import AttentionCapture
from loraplex.viz.attention_page import write_page
from loraplex.viz.attention_pictures import (
    mean_attention,
    plot_compared,
    plot_heads,
    plot_residual_norms,
    plot_text,
)
from loraplex.viz.style import tick_label

TOKENS = ("The", " price", " is", " $5", "</script>", "\n", " in", " Paris")


def capture(seed: int = 0, *, norms: bool = True) -> AttentionCapture:
    draw = np.random.default_rng(seed)
    weights = draw.random((2, 3, 6, 8)).astype(np.float32)
    positions = tuple(range(2, 8))
    weights *= np.arange(8) <= np.array(positions)[:, None]
    weights /= weights.sum(axis=-1, keepdims=True)
    return AttentionCapture(
        weights=weights,
        layers=(4, 7),
        heads=(0, 1, 5),
        query_positions=positions,
        key_tokens=TOKENS,
        residual_norms=draw.random((2, 6)).astype(np.float32) if norms else None,
    )


def test_pictures_are_written(tmp_path: Path) -> None:
    plot_heads(capture(), 7, tmp_path / "sub" / "heads.png")
    plot_text([capture(), capture(1)], ["one", "two"], tmp_path / "text.png")
    plot_residual_norms(capture(), tmp_path / "norms.png")
    plot_compared(capture(), capture(1), tmp_path / "compared.png")
    for picture in tmp_path.rglob("*.png"):
        pixels = imread(picture)
        assert pixels.shape[0] > 80
        assert pixels.std() > 0.01, f"{picture.name} is blank"
    assert len(list(tmp_path.rglob("*.png"))) == 4


def test_mean_attention_leaves_out_queries_that_can_not_see_a_token() -> None:
    one = capture()
    means = mean_attention(one)
    assert means[7] == pytest.approx(one.weights[:, :, 5, 7].mean(), rel=1e-5)
    assert means[0] == pytest.approx(one.weights[:, :, :, 0].mean(), rel=1e-5)


def test_page_holds_weights_and_tokens_as_they_are(tmp_path: Path) -> None:
    one = capture()
    write_page([one, capture(1, norms=False)], ["a <b>", "c"], tmp_path / "page.html", title="<x>")
    page = (tmp_path / "page.html").read_text()
    assert "<title>Attention</title>" in page
    assert "<h1>&lt;x&gt;</h1>" in page
    assert "http" not in page, "the page must need nothing else"
    data = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
    assert data is not None
    rows = json.loads(data[1])
    assert rows[0]["tokens"] == list(TOKENS)
    assert rows[1]["norms"] is None
    stored = np.frombuffer(base64.b64decode(rows[0]["weights"]), dtype=np.uint8).reshape(one.weights.shape)
    assert np.abs((stored / 255.0) ** 2 - one.weights).max() < 0.005


def test_what_can_not_be_shown_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="layer 5"):
        plot_heads(capture(), 5, tmp_path / "x.png")
    with pytest.raises(RequestError, match="no residuals"):
        plot_residual_norms(capture(norms=False), tmp_path / "x.png")
    with pytest.raises(RequestError, match="label"):
        write_page([capture()], [], tmp_path / "x.html")
    assert not list(tmp_path.iterdir())


def test_labels_show_what_can_not_be_printed() -> None:
    assert tick_label("\n") == "↵"
    assert tick_label(" ") == "␣"
    assert tick_label("\x00a") == "□a"
    assert tick_label("a" * 20) == "a" * 13 + "…"
