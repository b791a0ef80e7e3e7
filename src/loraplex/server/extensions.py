"""What goes beyond OpenAI's API: scalings and captured attention."""

import base64
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import orjson

from loraplex.engine.request import Completion
from loraplex.residual.capture import AttentionCapture, CaptureRequest
from loraplex.server.schemas.generation import CaptureAttention
from loraplex.server.token_texts import TokenTexts
from loraplex.xlora.scalings.row_scalings import RowScalings

Encoding = Literal["base64", "list"]
_PIECE = 3 * 2**14  # numbers, or bytes, that are written at once; base64 takes three bytes at a time


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
    """Shape, type and numbers: nested lists, or the little-endian bytes in base64.

    The numbers are written in pieces, between which another thread may run: an array can have millions.
    """
    described = {"shape": list(array.shape), "dtype": str(array.dtype)}
    if encoding == "list":
        return described | {"data": orjson.Fragment(b"".join(_nested(array)))}
    little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    content = memoryview(little.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
    pieces = (base64.b64encode(content[start : start + _PIECE]) for start in range(0, len(content), _PIECE))
    return described | {"data": orjson.Fragment(b'"' + b"".join(pieces) + b'"')}


def _nested(array: np.ndarray) -> Iterator[bytes]:
    """The JSON of nested lists, of at most `_PIECE` numbers at a time."""
    if array.size <= _PIECE:
        yield _numbers(array)
        return
    separator, row_size = b"[", array[0].size
    rows = max(1, _PIECE // row_size)
    for start in range(0, len(array), rows):
        yield separator
        separator = b","
        if row_size > _PIECE:
            yield from _nested(array[start])
        else:
            yield _numbers(array[start : start + rows])[1:-1]
    yield b"]"


def _numbers(array: np.ndarray) -> bytes:
    exact = np.float64 if array.dtype.kind == "f" else array.dtype  # so that all digits are written
    return orjson.dumps(np.ascontiguousarray(array, dtype=exact), option=orjson.OPT_SERIALIZE_NUMPY)
