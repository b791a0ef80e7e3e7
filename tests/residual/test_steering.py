"""Spans emphasised and muted, against masks and against weights computed by hand."""

import math

import pytest
import torch
from torch import Tensor

from loraplex.errors import RequestError
from loraplex.residual.calls import captures, make_scope
from loraplex.residual.capture import CaptureRequest
from loraplex.residual.layers import AttentionLayers
from loraplex.residual.scope import use_attention
from loraplex.residual.steering import Steering
from tests.parity.oracle import padded_batch
from tests.residual.tiny_residuals import forward, generate, random_linked, row
from tests.tiny_models import VOCAB_SIZE, tiny_model

LENGTH = 12
SPANS = ((2, 5), (7, 8))
NAMES = ("llama", "mistral", "gemma2", "gemma3", "gpt2", "gpt_neox")


def prompt() -> tuple[Tensor, Tensor]:
    return padded_batch(3, LENGTH, "left", VOCAB_SIZE)


@pytest.mark.parametrize("name", NAMES)
def test_strength_one_is_exactly_no_steering(name: str) -> None:
    base = tiny_model(name)
    layers = AttentionLayers(base)
    ids, mask = prompt()
    plain, _ = forward(base, layers, [row()] * 3, ids, mask)
    steered, scope = forward(base, layers, [row(steering=(Steering(spans=SPANS, strength=1),))] * 3, ids, mask)
    assert steered.logits.equal(plain.logits)
    assert not any(row.asks for row in scope.plans.rows)


@pytest.mark.parametrize("name", NAMES)
def test_strength_zero_equals_masking_the_keys(name: str) -> None:
    base = tiny_model(name)
    layers = AttentionLayers(base)
    ids, mask = prompt()
    rows = [row(), row(steering=(Steering(spans=SPANS, strength=0),)), row()]
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    steered, _ = forward(base, layers, rows, ids, mask, position_ids=positions)
    masked = mask.clone()
    for start, stop in SPANS:
        masked[1, start + 1 : stop + 1] = 0  # row 1 has one token of padding
    expected, _ = forward(base, layers, [row()] * 3, ids, masked, position_ids=positions)
    shown = masked[1].bool()
    assert (steered.logits[1, shown] - expected.logits[1, shown]).abs().max().item() <= 1e-6
    assert steered.logits[0].equal(expected.logits[0])
    assert steered.logits[2].equal(expected.logits[2])


def test_strength_multiplies_the_attention_before_it_is_normalised() -> None:
    base = tiny_model("llama")
    layers = AttentionLayers(base)
    ids = prompt()[0][:1].expand(4, -1)
    capture = CaptureRequest(layers=(0,))
    steerings = [
        (),
        (Steering(spans=((2, 5),), strength=3),),
        (Steering(spans=((2, 5),), strength=3, heads=(1, 3)),),
        (Steering(spans=((2, 4),), strength=3), Steering(spans=((3, 5),), strength=0.5)),
    ]
    rows = [row(capture=capture, steering=steering) for steering in steerings]
    _, scope = forward(base, layers, rows, ids)
    plain, all_heads, some_heads, two = (torch.from_numpy(c.weights[0]) for c in captures(scope, ids, None) if c)
    factors = torch.ones(LENGTH)
    factors[2:5] = 3
    expected = plain * factors / (plain * factors).sum(dim=-1, keepdim=True)
    assert torch.allclose(all_heads, expected, atol=1e-6)
    assert torch.allclose(some_heads[[1, 3]], expected[[1, 3]], atol=1e-6)
    assert some_heads[[0, 2]].equal(plain[[0, 2]])
    factors = torch.tensor([1, 1, 3, 1.5, 0.5, 1, 1, 1, 1, 1, 1, 1])
    assert torch.allclose(two, plain * factors / (plain * factors).sum(dim=-1, keepdim=True), atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_spans_get_their_share_where_they_had_less(name: str) -> None:
    """Against the definition, by head and query; and the output is attention by those weights."""
    base = tiny_model(name)
    layers = AttentionLayers(base)
    ids = prompt()[0][:1].expand(3, -1)
    capture = CaptureRequest(layers=(0,))
    steerings = [(), (Steering(spans=SPANS, share=0.45),), (Steering(spans=SPANS, share=0.45, heads=(1, 2)),)]
    rows = [row(capture=capture, steering=steering) for steering in steerings]
    output, scope = forward(base, layers, rows, ids)
    plain, shared, some = (torch.from_numpy(c.weights[0]).double() for c in captures(scope, ids, None) if c)
    meant = torch.zeros(LENGTH, dtype=torch.bool)
    for start, stop in SPANS:
        meant[start:stop] = True
    before, after = plain[..., meant].sum(dim=-1), shared[..., meant].sum(dim=-1)
    is_raised = (before > 1e-6) & (before < 0.45)
    assert is_raised.any()
    assert (~is_raised & (before > 0.45)).any()
    assert torch.allclose(after, torch.where(is_raised, 0.45, before), atol=1e-5)
    assert torch.allclose(shared.sum(dim=-1), plain.sum(dim=-1), atol=1e-5)
    for part in (meant, ~meant):  # in their proportions
        own, former = shared[..., part], plain[..., part]
        factor = own.sum(dim=-1, keepdim=True) / former.sum(dim=-1, keepdim=True).clamp(min=1e-12)
        assert torch.allclose(own, former * factor, atol=1e-5)
    assert torch.allclose(some[[1, 2]], shared[[1, 2]], atol=1e-6)
    assert some[[0, 3]].equal(plain[[0, 3]])
    assert not torch.allclose(output.logits[0], output.logits[1], atol=1e-3)


def test_attention_to_a_share_is_the_sum_of_the_values_by_its_weights() -> None:
    """The block's output, by hand, from the captured weights."""
    base = tiny_model("llama")
    layers = AttentionLayers(base)
    ids = prompt()[0][:1]
    seen: list[Tensor] = []
    attention = base.model.layers[0].self_attn
    handles = [
        attention.v_proj.register_forward_hook(lambda module, args, out: seen.append(out)),
        attention.o_proj.register_forward_hook(lambda module, args, out: seen.append(args[0])),
    ]
    steered = row(capture=CaptureRequest(layers=(0,)), steering=(Steering(spans=SPANS, share=0.6),))
    _, scope = forward(base, layers, [steered], ids)
    for handle in handles:
        handle.remove()
    weights = torch.from_numpy(captures(scope, ids, None)[0].weights[0])  # type: ignore[union-attr]
    heads = weights.shape[0]
    values = seen[0][0].view(LENGTH, -1, attention.head_dim).transpose(0, 1)
    values = values.repeat_interleave(heads // len(values), dim=0)
    expected = (weights @ values).transpose(0, 1).reshape(LENGTH, -1)
    assert torch.allclose(seen[1][0], expected, atol=1e-5)


def test_captured_and_steered_rows_of_a_bfloat16_model() -> None:
    base = tiny_model("llama", dtype=torch.bfloat16)
    layers = AttentionLayers(base)
    ids, mask = prompt()
    capture = CaptureRequest(layers=(0,))
    linked = {"a": (random_linked(layers, 1), 1.0)}
    rows = [row(), row(linked, capture=capture, steering=(Steering(spans=SPANS, strength=4),)), row(linked)]
    output, scope = forward(base, layers, rows, ids, mask)
    result = captures(scope, ids, None)[1]
    assert result is not None
    assert abs(result.weights.sum(axis=-1) - 1).max() < 1e-5
    exact = tiny_model("llama")
    wide, _ = forward(exact, AttentionLayers(exact), rows, ids, mask)
    shown = mask.bool()
    difference = (output.logits.float() - wide.logits)[shown].abs().max()
    assert output.logits.dtype == torch.bfloat16
    assert difference < 0.05 * (wide.logits.max() - wide.logits.min())


def test_layers_that_are_not_chosen_stay_as_they_were() -> None:
    base = tiny_model("llama")
    layers = AttentionLayers(base)
    ids = prompt()[0][:1].expand(2, -1)
    rows = [row(capture=CaptureRequest()), row(capture=CaptureRequest(), steering=(last_layer_muted(),))]
    _, scope = forward(base, layers, rows, ids)
    plain, steered = (torch.from_numpy(c.weights) for c in captures(scope, ids, None) if c)
    assert steered[0].equal(plain[0])
    assert steered[1, :, 5:, 2:5].abs().max() == 0
    assert plain[1, :, 5:, 2:5].max() > 0.01


def last_layer_muted() -> Steering:
    return Steering(spans=((2, 5),), strength=0, layers=(1,))


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_spans_survive_generation(name: str) -> None:
    base = tiny_model(name)
    layers = AttentionLayers(base)
    ids, mask = prompt()
    steering = Steering(spans=SPANS, strength=0.05)
    rows = [row(), row(steering=(steering,)), row({"a": (random_linked(layers, 1), 1.0)}, steering=(steering,))]
    options = {"max_new_tokens": 16, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    generated, _ = generate(base, layers, rows, ids, mask, **options)
    whole = torch.cat([mask, torch.ones(3, 16, dtype=mask.dtype)], dim=1)
    positions = (whole.cumsum(dim=1) - 1).clamp(min=0)
    logits = forward(base, layers, rows, generated.sequences, whole, position_ids=positions, use_cache=False)[0].logits
    assert torch.allclose(torch.stack(generated.logits, dim=1), logits[:, LENGTH - 1 : -1], atol=1e-3)
    plain, _ = generate(base, layers, [row()] * 3, ids, mask, **options)
    assert plain.sequences[0].equal(generated.sequences[0])
    assert not torch.allclose(plain.logits[0][1], generated.logits[0][1], atol=1e-2)


def test_gradients_flow_through_steered_rows() -> None:
    base = tiny_model("llama")
    layers = AttentionLayers(base)
    embedded = base.get_input_embeddings()(prompt()[0][:2]).detach().requires_grad_()
    rows = [row(), row(steering=(Steering(spans=((0, 2),), strength=2),))]
    with use_attention(make_scope(rows, layers, None, LENGTH)):
        base(inputs_embeds=embedded, use_cache=False).logits.square().sum().backward()
    assert embedded.grad is not None
    assert embedded.grad.isfinite().all()
    assert embedded.grad[1].abs().sum() > 0


@pytest.mark.parametrize(
    ("steering", "message"),
    [
        ({"spans": ((0, LENGTH + 1),), "strength": 2}, "not in its prompt"),
        ({"spans": ((5, 5),), "strength": 2}, "not in its prompt"),
        ({"spans": ((-1, 2),), "strength": 2}, "not in its prompt"),
        ({"spans": ((0, 2),), "strength": 2, "layers": (9,)}, "layers 0 to 1"),
        ({"spans": ((0, 2),), "strength": 2, "heads": (4,)}, "heads 0 to 3"),
    ],
)
def test_steering_of_what_is_not_there_is_refused(steering: dict, message: str) -> None:  # type: ignore[type-arg]
    base = tiny_model("llama")
    layers = AttentionLayers(base)
    ids, mask = prompt()
    with pytest.raises(RequestError, match=message):
        forward(base, layers, [row(steering=(Steering(**steering),)), row(), row()], ids, mask)


@pytest.mark.parametrize("strength", [-1, math.inf, math.nan, "2", True])
def test_strengths_that_mean_nothing_are_refused(strength: object) -> None:
    with pytest.raises(RequestError, match="strength"):
        Steering(spans=((0, 1),), strength=strength)  # type: ignore[arg-type]
