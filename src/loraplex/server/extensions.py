"""What goes beyond OpenAI's API: scalings, captured attention, steering."""

import base64
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from loraplex.engine.request import Completion
from loraplex.residual.capture import AttentionCapture, CaptureRequest
from loraplex.residual.spans import spans_of_text
from loraplex.residual.steering import Span, Steering
from loraplex.server.api_errors import BAD_REQUEST, ApiError
from loraplex.server.schemas.generation import CaptureAttention, Steer
from loraplex.server.token_texts import TokenTexts
from loraplex.xlora.scalings.row_scalings import RowScalings

Encoding = Literal["base64", "list"]


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


def steerings(
    body: Sequence[Steer] | None,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | None,  # None: token ids, in which no text can be found
    *,
    add_special_tokens: bool,
) -> tuple[Steering, ...]:
    """The engine's steerings; texts are looked up in the prompt."""
    made = []
    for place, steer in enumerate(body or ()):
        spans = _spans(steer, f"steer.{place}", tokenizer, prompt, add_special_tokens)
        layers = None if steer.layers is None else tuple(steer.layers)
        heads = None if steer.heads is None else tuple(steer.heads)
        made.append(Steering(spans=spans, strength=steer.strength, layers=layers, heads=heads))
    return tuple(made)


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
    described = {"shape": list(array.shape), "dtype": str(array.dtype)}
    if encoding == "list":
        return described | {"data": array.tolist()}
    little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    return described | {"data": base64.b64encode(little.tobytes()).decode()}


def _spans(
    steer: Steer, param: str, tokenizer: PreTrainedTokenizerBase, prompt: str | None, add_special_tokens: bool
) -> tuple[Span, ...]:
    has_range = steer.start is not None and steer.end is not None
    if has_range == (steer.text is not None) or (steer.start is None) != (steer.end is None):
        raise ApiError(BAD_REQUEST, f"{param}: give either text, or start and end.", param=param)
    if steer.start is not None and steer.end is not None:
        return ((steer.start, steer.end),)
    if prompt is None:
        raise ApiError(BAD_REQUEST, f"{param}: a prompt of token ids is steered by start and end.", param=param)
    assert steer.text is not None, "a steering has neither range nor text"
    return spans_of_text(tokenizer, prompt, steer.text, add_special_tokens=add_special_tokens)
