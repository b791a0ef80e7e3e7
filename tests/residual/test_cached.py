"""Generation with a KV cache equals the uncached forward, u included."""

import pytest
import torch

from loraplex.errors import RequestError
from loraplex.residual.cache import FollowedCache, ResidualState
from loraplex.residual.layers import AttentionLayers
from tests.parity.oracle import padded_batch
from tests.residual.tiny_residuals import forward, generate, random_linked, random_vector, row
from tests.tiny_models import VOCAB_SIZE, tiny_model

LENGTH = 10
NAMES = ("llama", "mistral", "gemma2", "gemma3", "gpt2", "gpt_neox")


def linked_rows(layers: AttentionLayers) -> list:  # type: ignore[type-arg]
    a, b, v = random_linked(layers, 1), random_linked(layers, 2, r=5), random_vector(layers, 3)
    return [row(), row({"a": (a, 0.5), "b": (b, 0.5)}), row({"v": (v, 0.3), "b": (b, 0.5)}), row({"a": (a, -0.5)})]


@pytest.mark.parametrize("name", NAMES)
def test_cached_generation_of_200_tokens_equals_uncached_forward(name: str) -> None:
    base = tiny_model(name)
    layers = AttentionLayers(base)
    rows = linked_rows(layers)
    ids, mask = padded_batch(4, LENGTH, "left", VOCAB_SIZE)
    options = {"max_new_tokens": 200, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    generated, _ = generate(base, layers, rows, ids, mask, **options)
    whole = torch.cat([mask, torch.ones(4, 200, dtype=mask.dtype)], dim=1)
    positions = (whole.cumsum(dim=1) - 1).clamp(min=0)
    logits = forward(base, layers, rows, generated.sequences, whole, position_ids=positions, use_cache=False)[0].logits[
        :, LENGTH - 1 : -1
    ]
    cached = torch.stack(generated.logits, dim=1)
    span = (logits.max() - logits.min()).item()
    assert (cached - logits).abs().max().item() <= 1e-4 * max(1.0, span)
    texts = {tuple(sequence.tolist()) for sequence in generated.sequences[:, LENGTH:]}
    assert len(texts) == 4, "the rows generate the same"


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_beams_take_u_along(name: str) -> None:
    base = tiny_model(name)
    layers = AttentionLayers(base)
    rows = linked_rows(layers)
    ids, mask = padded_batch(4, LENGTH, "left", VOCAB_SIZE)
    options = {"max_new_tokens": 20, "num_beams": 3, "do_sample": False}
    cached, _ = generate(base, layers, rows, ids, mask, **options)
    uncached, _ = generate(base, layers, rows, ids, mask, use_cache=False, **options)
    assert cached.equal(uncached)


def test_forward_in_pieces_equals_forward_at_once() -> None:
    base = tiny_model("llama")
    layers = AttentionLayers(base)
    rows = linked_rows(layers)
    ids, mask = padded_batch(4, LENGTH, "left", VOCAB_SIZE)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    whole = forward(base, layers, rows, ids, mask, position_ids=positions)[0].logits
    cache, parts = FollowedCache(config=base.config), []
    for start, stop in ((0, 6), (6, 7), (7, LENGTH)):
        output, _ = forward(
            base,
            layers,
            rows,
            ids[:, start:stop],
            mask[:, :stop],
            position_ids=positions[:, start:stop],
            past_key_values=cache,
            use_cache=True,
        )
        parts.append(output.logits)
    joined = torch.cat(parts, dim=1)
    assert torch.allclose(joined[mask.bool()], whole[mask.bool()], atol=1e-4)


def test_cache_of_other_residuals_is_refused() -> None:
    base = tiny_model("llama")
    layers = AttentionLayers(base)
    a, b = random_linked(layers, 1), random_linked(layers, 2)
    ids, mask = padded_batch(1, LENGTH, "left", VOCAB_SIZE)
    cache = FollowedCache(config=base.config)
    forward(base, layers, [row({"a": (a, 1.0)})], ids, mask, past_key_values=cache)
    longer = torch.ones(1, LENGTH + 1, dtype=mask.dtype)
    with pytest.raises(RequestError, match="other residuals"):
        forward(base, layers, [row({"a": (b, 1.0)})], ids[:, :1], longer, past_key_values=cache)
    plain = base(input_ids=ids, use_cache=True).past_key_values
    with pytest.raises(RequestError, match="FollowedCache"):
        forward(base, layers, [row({"a": (a, 1.0)})], ids[:, :1], longer, past_key_values=plain)


def test_state_follows_the_cache() -> None:
    state = ResidualState()
    sequences, u = torch.tensor([2, 3]), torch.arange(8.0).view(2, 4, 1)
    state.extend((0, 0), sequences, u)
    state.reorder_cache(torch.tensor([1, 1, 3, 3]))
    assert state.extend((0, 0), sequences, u[:, :0]).equal(u[[1, 1]])
    state.batch_repeat_interleave(2)
    copies = torch.tensor([4, 5, 6, 7])
    assert state.extend((0, 0), copies, u[:1, :0].expand(4, -1, -1)).equal(u[[1, 1, 1, 1]])
    state.crop(-3)
    state.batch_select_indices(torch.tensor([0, 5]))
    assert state.extend((0, 0), torch.tensor([1]), u[:1, :0]).equal(u[[1], :1])
    assert state.num_bytes == 4
