"""Captured attention against transformers' own, which eager attention returns."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from loraplex.residual.calls import captures, num_left_padding
from loraplex.residual.capture import AttentionCapture, CaptureRequest
from loraplex.residual.layers import AttentionLayers
from tests.parity.oracle import padded_batch
from tests.residual.tiny_residuals import forward, generate, row
from tests.tiny_models import SLIDING_WINDOW, TINY_CAUSAL_MODELS, VOCAB_SIZE, tiny_model

TOLERANCE = 1e-5
LENGTH = 4 * SLIDING_WINDOW
NEW_TOKENS = 12


@torch.no_grad()
def eager_attention(base: PreTrainedModel, ids: Tensor, mask: Tensor, **inputs: Any) -> list[Tensor]:
    """By layer [rows, heads, queries, keys]."""
    before = base.config._attn_implementation
    base.set_attn_implementation("eager")
    try:
        output = base(input_ids=ids, attention_mask=mask, output_attentions=True, use_cache=False, **inputs)
    finally:
        base.set_attn_implementation(before)
    return list(output.attentions)


def assert_captured(capture: AttentionCapture | None, eager: list[Tensor], row: int, mask: Tensor) -> None:
    """Equal for the layers, heads and queries that were captured, but for queries that are padding."""
    assert capture is not None
    padding = num_left_padding(mask, mask.shape[0])[row]
    num_keys = len(capture.key_tokens)
    real = [place for place, position in enumerate(capture.query_positions) if mask[row, padding + position]]
    positions = [padding + capture.query_positions[place] for place in real]
    assert real, "nothing was captured"
    for place, layer in enumerate(capture.layers):
        expected = eager[layer][row][:, positions, padding : padding + num_keys]
        expected = expected.mean(dim=0, keepdim=True) if capture.heads is None else expected[list(capture.heads)]
        kept = torch.from_numpy(capture.weights[place])[:, real]
        error = (kept - expected).abs().max().item()
        assert error <= TOLERANCE, f"layer {layer} of row {row} is off by {error:.1e}"
        assert torch.allclose(kept.sum(dim=-1), torch.ones(()))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", TINY_CAUSAL_MODELS)
def test_forward_capture_equals_eager_attention(name: str, side: str) -> None:
    base = tiny_model(name)
    ids, mask = padded_batch(3, LENGTH, side, VOCAB_SIZE)
    eager = eager_attention(base, ids, mask)
    layers = AttentionLayers(base)
    rows = [
        row(),
        row(capture=CaptureRequest()),
        row(capture=CaptureRequest(layers=(1,), heads=(2, 0), queries=LENGTH // 2)),
    ]
    _, scope = forward(base, layers, rows, ids, mask)
    results = captures(scope, ids, None)
    assert results[0] is None
    assert_captured(results[1], eager, 1, mask)
    assert_captured(results[2], eager, 2, mask)


@pytest.mark.parametrize("name", TINY_CAUSAL_MODELS)
def test_generation_capture_equals_eager_attention_over_the_whole_text(name: str) -> None:
    base = tiny_model(name)
    ids, mask = padded_batch(3, LENGTH, "left", VOCAB_SIZE)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    alone = base.generate(ids, attention_mask=mask, **options)
    layers = AttentionLayers(base)
    rows = [
        row(capture=CaptureRequest(reduce="mean")),
        row(),
        row(capture=CaptureRequest(queries="generated", layers=(0, 1))),
    ]
    sequences, scope = generate(base, layers, rows, ids, mask, **options)
    assert sequences.equal(alone), "capturing changed what is generated"
    whole = torch.cat([mask, torch.ones(3, NEW_TOKENS, dtype=mask.dtype)], dim=1)
    positions = {} if name == "opt" else {"position_ids": (whole.cumsum(dim=1) - 1).clamp(min=0)}
    eager = eager_attention(base, sequences, whole, **positions)
    results = captures(scope, sequences, None)
    for number in (0, 2):
        assert_captured(results[number], eager, number, whole)
    assert results[2] is not None
    assert len(results[2].query_positions) == NEW_TOKENS
    assert len(results[2].key_tokens) == int(mask[2].sum()) + NEW_TOKENS - 1
