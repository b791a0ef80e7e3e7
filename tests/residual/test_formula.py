"""Residuals against the formula, written as loops in float64, and their gradients."""

import math

import pytest
import torch
from torch import Tensor

from loraplex.residual.attention_weights import AttentionWeights
from loraplex.residual.calls import make_scope
from loraplex.residual.compute import stack_linked
from loraplex.residual.hooks import layer_number
from loraplex.residual.layers import AttentionLayers
from loraplex.residual.modules import LinkedLayer, LinkedResidual
from loraplex.residual.scope import use_attention
from tests.hook_oracle import as_oracle, linked_formula, logits_with
from tests.parity.oracle import padded_batch
from tests.residual.tiny_residuals import forward, random_linked, random_vector, row
from tests.tiny_models import VOCAB_SIZE, tiny_model

LENGTH = 12
NAMES = ("llama", "mistral", "gemma2", "gemma3", "gpt2", "gpt_neox")


def formula_in_loops(
    x: Tensor,  # [tokens, hidden]
    attention: Tensor,  # [heads, tokens, tokens]
    weights: LinkedLayer,
    scaling: float,  # weight * alpha/r
) -> Tensor:  # [tokens, hidden]  float64
    """One LinkedResidual at one layer of one row, written as loops over tokens, rank rows, heads and keys."""
    num_heads, num_tokens, _ = attention.shape
    a, b = weights.a.double(), weights.b.double()
    x, attention = x.double(), attention.double()
    residual = torch.zeros(num_tokens, b.shape[1], dtype=torch.float64)
    for k in range(weights.rank):
        exponentials = [math.exp(float(logit)) for logit in weights.head_logits[k]]
        mix = [value / sum(exponentials) for value in exponentials]
        u = [float(a[k] @ x[s]) for s in range(num_tokens)]
        for t in range(num_tokens):
            v = 0.0
            for s in range(num_tokens):
                w = sum(mix[h] * float(attention[h, t, s]) for h in range(num_heads))
                v += w * u[s]
            residual[t] += scaling * v * b[k]
    return residual


def test_the_oracle_is_the_formula_written_as_loops() -> None:
    draw = torch.Generator().manual_seed(0)
    weights = LinkedLayer(
        a=torch.randn(3, 6, generator=draw),
        b=torch.randn(3, 6, generator=draw),
        head_logits=torch.randn(3, 4, generator=draw),
    )
    x = torch.randn(5, 6, generator=draw, dtype=torch.float64)
    attention = torch.rand(4, 5, 5, generator=draw, dtype=torch.float64).tril()
    found = linked_formula(x.unsqueeze(0), attention.unsqueeze(0), weights, 0.7)[0]
    assert torch.allclose(found, formula_in_loops(x, attention, weights, 0.7), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_mixed_batch_equals_reference_row_by_row(name: str) -> None:
    base, oracle = tiny_model(name), as_oracle(tiny_model(name))
    layers = AttentionLayers(base)
    a, b, c = (random_linked(layers, 1), random_linked(layers, 2, r=5), random_linked(layers, 3, at=[1]))
    chains = [[], [(a, 1.0)], [(a, 0.5), (b, -1.5)], [(b, -1.5), (a, 0.5)], [(c, 1.0), (a, 1.0), (b, 1.0)]]
    rows = [row({str(place): link for place, link in enumerate(chain)}) for chain in chains]
    ids, _ = padded_batch(1, LENGTH, "left", VOCAB_SIZE)
    output, _ = forward(base, layers, rows, ids.expand(len(rows), -1))
    expected = [logits_with(oracle, layers.layers, chain, ids)[0] for chain in chains]
    for number, reference in enumerate(expected):
        span = (reference.max() - reference.min()).item()
        assert (output.logits[number] - reference).abs().max().item() <= 1e-4 * min(1, span)
    assert (expected[2] - expected[3]).abs().max() > 1e-2, "the order of the link makes no difference"
    assert (expected[1] - expected[0]).abs().max() > 1e-1, "the residual makes no difference"


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_neighbours_change_nothing(side: str) -> None:
    base = tiny_model("llama")
    layers = AttentionLayers(base)
    a, b = random_linked(layers, 1), random_linked(layers, 2)
    rows = [row(), row({"a": (a, 1.0), "b": (b, 0.7)}), row({"b": (b, 1.0)})]
    ids, mask = padded_batch(3, LENGTH, side, VOCAB_SIZE)
    together = forward(base, layers, rows, ids, mask)[0].logits
    for number in range(3):
        real = mask[number].bool()
        alone = forward(base, layers, [rows[number]], ids[number, real].unsqueeze(0))[0].logits[0]
        assert torch.allclose(together[number, real], alone, atol=1e-4)


def test_rows_that_ask_for_nothing_equal_the_base_model_to_the_bit() -> None:
    base = tiny_model("llama")
    ids, mask = padded_batch(3, LENGTH, "left", VOCAB_SIZE)
    with torch.no_grad():
        alone = base(input_ids=ids, attention_mask=mask).logits
    layers = AttentionLayers(base)
    rows = [row(), row({"a": (random_linked(layers, 1), 1.0)}), row()]
    together = forward(base, layers, rows, ids, mask)[0].logits
    assert together[0].equal(alone[0])
    assert together[2].equal(alone[2])
    layers.detach()
    with torch.no_grad():
        assert base(input_ids=ids, attention_mask=mask).logits.equal(alone)
    assert base.config._attn_implementation == "sdpa"
    assert all(layer_number(module) is None for module in base.modules())


def test_steering_vector_adds_its_weighted_vector_to_each_token() -> None:
    base = tiny_model("gpt2")
    layers = AttentionLayers(base)
    vector = random_vector(layers, 0)
    ids, _ = padded_batch(1, LENGTH, "left", VOCAB_SIZE)
    steered = forward(base, layers, [row({"v": (vector, 0.5)})], ids)[0].logits
    expected = logits_with(as_oracle(tiny_model("gpt2")), layers.layers, [(vector, 0.5)], ids).float()
    assert torch.allclose(steered, expected, atol=1e-5)
    assert not torch.allclose(expected, base(input_ids=ids).logits, atol=1e-2)


def test_gradients_of_one_linked_residual_pass_gradcheck() -> None:
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64).requires_grad_()

    query, key, x = normal(2, 4, 5, 3), normal(2, 2, 5, 3), normal(2, 5, 6)
    factors = [normal(3, 6), normal(3, 6), normal(3, 4), normal(2, 6), normal(2, 6), normal(2, 4)]

    def run(query: Tensor, key: Tensor, x: Tensor, *factors: Tensor) -> Tensor:
        weights = AttentionWeights(
            query, key, None, sequences=torch.arange(2), scaling=0.5, softcap=5.0, is_causal=True
        )
        first = LinkedLayer(a=factors[0], b=factors[1], head_logits=factors[2])
        second = LinkedLayer(a=factors[3], b=factors[4], head_logits=factors[5])
        part = stack_linked([first, second], [0.7, -1.3], None, torch.float64)
        return part.run(x, weights, lambda u: u)

    assert torch.autograd.gradcheck(run, (query, key, x, *factors))


def test_gradients_through_a_whole_model_and_a_link_pass_gradcheck() -> None:
    # Not Llama, whose norm computes in float32 whatever the dtype.
    base = tiny_model("gpt2", dtype=torch.float64).requires_grad_(False)
    layers = AttentionLayers(base)
    residuals = [random_linked(layers, seed, r=1, dtype=torch.float64) for seed in (1, 2)]
    ids, mask = padded_batch(2, 4, "left", VOCAB_SIZE)
    flat = [
        tensor.clone().requires_grad_()
        for residual in residuals
        for weights in residual.layers.values()
        for tensor in (weights.a, weights.b, weights.head_logits)
    ]

    def run(*tensors: Tensor) -> Tensor:
        parts = iter(tensors)
        made = [
            LinkedResidual(
                config=residual.config,
                layers={
                    layer: LinkedLayer(a=next(parts), b=next(parts), head_logits=next(parts))
                    for layer in residual.layers
                },
                base=layers.identity,
            )
            for residual in residuals
        ]
        rows = [row({"a": (made[0], 1.0), "b": (made[1], 0.5)}), row({"b": (made[1], 1.0)})]
        with use_attention(make_scope(rows, layers, mask, ids.shape[1])):
            logits: Tensor = base(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return logits[:, -1, :3]

    assert torch.autograd.gradcheck(run, tuple(flat), fast_mode=True)
