"""What goes beyond OpenAI's API: scalings and captured attention."""

from typing import Any

import numpy as np

from loraplex.engine.request import Completion
from loraplex.residual.capture import AttentionCapture, CaptureRequest
from loraplex.server.api.json_pieces import Encoding, Numbers
from loraplex.server.api.schemas.generation import CaptureAttention
from loraplex.server.api.token_texts import TokenTexts
from loraplex.xlora.scalings.row_scalings import RowScalings


def capture_request(body: CaptureAttention | None, budget_bytes: int) -> CaptureRequest | None:
    if body is None:
        return None
    return CaptureRequest(
        layers=None if body.layers is None else tuple(body.layers),
        heads=None if body.heads is None else tuple(body.heads),
        queries=body.queries,
        reduce=body.reduce,
        dtype=body.dtype,
        budget_bytes=budget_bytes,
    )


def extras(completion: Completion, texts: TokenTexts, encoding: Encoding) -> dict[str, Any]:
    """The fields of a choice that a body asked for."""
    fields: dict[str, Any] = {}
    if completion.scalings is not None:
        fields["scalings"] = [scalings_json(row, texts, encoding) for row in completion.scalings]
    if completion.capture is not None:
        fields["captured_attention"] = capture_json(completion.capture, encoding)
    return fields


def scalings_json(row: RowScalings, texts: TokenTexts, encoding: Encoding) -> dict[str, Any]:
    """A mixture's scalings of every token that was run, prompt included."""
    return {
        "mixture": row.mixture,
        "experts": list(row.experts),
        "layers": list(row.layers),
        "tokens": [texts.of(token) for token in row.token_ids],
        "values": array_json(row.values.numpy(), encoding),
    }


def capture_json(capture: AttentionCapture, encoding: Encoding) -> dict[str, Any]:
    return {
        "layers": list(capture.layers),
        "heads": None if capture.heads is None else list(capture.heads),
        "query_positions": list(capture.query_positions),
        "tokens": list(capture.key_tokens),
        "weights": array_json(capture.weights, encoding),
        "residual_norms": None if capture.residual_norms is None else array_json(capture.residual_norms, encoding),
    }


def array_json(array: np.ndarray, encoding: Encoding) -> dict[str, Any]:
    """Shape, type and numbers: nested lists, or the little-endian bytes in base64."""
    return {"shape": list(array.shape), "dtype": str(array.dtype), "data": Numbers(array, encoding)}
