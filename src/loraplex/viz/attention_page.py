"""Captured attention as one HTML page that needs nothing else: tokens to click, layers and heads to choose."""

import base64
import html
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from loraplex.errors import RequestError
from loraplex.output_files import whole_file
from loraplex.residual.capture import AttentionCapture


def write_page(
    captures: Sequence[AttentionCapture], labels: Sequence[str], path: str | Path, *, title: str = "Attention"
) -> None:
    """Write the captures side by side; they must have the same layers and heads. Raises RequestError."""
    if not captures or len(captures) != len(labels):
        raise RequestError(
            f"{len(captures)} captures have {len(labels)} labels. Give at least one capture, each a label."
        )
    for capture in captures:
        if (capture.layers, capture.heads) != (captures[0].layers, captures[0].heads):
            raise RequestError(
                f"the captures have different layers or heads: {list(captures[0].layers)} and {captures[0].heads}, but "
                f"{list(capture.layers)} and {capture.heads}. Capture the same in all rows."
            )
    rows = [_row(capture, label) for capture, label in zip(captures, labels, strict=True)]
    template = files("loraplex.viz").joinpath("page.html").read_text(encoding="utf-8")
    data = json.dumps(rows, ensure_ascii=False).replace("<", "\\u003c")  # a token must not end the script
    page = template.replace("__TITLE__", html.escape(title)).replace("__DATA__", data)
    with whole_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _row(capture: AttentionCapture, label: str) -> dict[str, Any]:
    roots = np.sqrt(np.clip(capture.weights.astype(np.float32), 0, 1))  # small weights keep some digits
    norms = capture.residual_norms
    return {
        "label": label,
        "tokens": list(capture.key_tokens),
        "positions": list(capture.query_positions),
        "layers": list(capture.layers),
        "heads": None if capture.heads is None else list(capture.heads),
        "weights": base64.b64encode(np.rint(roots * 255).astype(np.uint8).tobytes()).decode("ascii"),
        "norms": None if norms is None else np.round(norms.astype(np.float64), 4).tolist(),
    }
