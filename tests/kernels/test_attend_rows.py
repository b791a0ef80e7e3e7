"""The compiled attention of one query a row against float64, over strides, masks and grouped queries."""

import pytest
import torch
from torch import Tensor

from loraplex.kernels.native import attend_rows_native
from tests.kernels.rounding import Sizes, excess

pytestmark = pytest.mark.needs("compiler")
DTYPES = (torch.float32, torch.bfloat16)
SHAPES = [(9, 3, 64, 64, 61), (4, 2, 16, 24, 500), (8, 1, 80, 7, 16), (2, 2, 7, 5, 1)]  # heads, kv_heads, dims, places


def random(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def float64_attention(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Sizes]:
    """The result, and what its rounding is measured against.

    A logit that is off by d, in parts of its terms' sizes, changes its weight by d of it, and all weights' sum.
    """
    groups = query.shape[1] // keys.shape[1]
    q, k, v = query.double(), *(states.double().repeat_interleave(groups, dim=1) for states in (keys, values))
    logits = torch.einsum("rhd,rhpd->rhp", q, k) * scale
    if mask is not None:
        logits = logits.masked_fill(~mask.unsqueeze(1), float("-inf"))
    weights = logits.softmax(-1)
    moved = 1 + torch.einsum("rhd,rhpd->rhp", q.abs(), k.abs()) * scale
    moved = weights * (moved + (weights * moved).sum(-1, keepdim=True))
    result, kept = (torch.einsum("rhp,rhpd->rhd", weights, each) for each in (v, v.abs()))
    return result, Sizes(torch.einsum("rhp,rhpd->rhd", moved, v.abs()), kept)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_equals_float64_on_a_window_of_a_buffer(dtype, shape, masked):
    heads, kv_heads, key_dim, value_dim, places = shape
    query = random(3, heads, key_dim, dtype=dtype, seed=0) * 3
    keys = random(5, kv_heads, places + 9, key_dim, dtype=dtype, seed=1)[1:4, :, 2 : 2 + places]
    values = random(5, kv_heads, places + 4, value_dim, dtype=dtype, seed=2)[1:4, :, 3 : 3 + places]
    mask = torch.arange(places).expand(3, places) >= torch.tensor([[0], [places // 2], [places - 1]])
    mask = mask if masked else None
    out = attend_rows_native(query, keys, values, mask, 0.3)
    expected, sizes = float64_attention(query, keys, values, mask, 0.3)
    assert excess(out, expected, sizes) <= 1
    shifted, _ = float64_attention(query, keys.roll(1, dims=2), values, mask, 0.3)
    assert places == 1 or excess(out, shifted, sizes) > 1  # the comparison can fail


def test_a_row_has_the_same_bits_alone_and_hidden_places_do_not_count():
    query, states = random(3, 4, 16, dtype=torch.float32, seed=0), random(3, 2, 20, 16, dtype=torch.float32, seed=1)
    mask = torch.ones(3, 20, dtype=torch.bool)
    mask[1, :7] = False
    together = attend_rows_native(query, states, states, mask, 0.25)
    alone = attend_rows_native(query[1:2], states[1:2], states[1:2], mask[1:2], 0.25)
    assert torch.equal(together[1:2], alone)
    states[1, :, :7] = 1e30
    assert torch.equal(attend_rows_native(query, states, states, mask, 0.25), together)


def test_a_row_that_sees_nothing_gets_zeros():
    query, states = torch.ones(1, 2, 16), torch.ones(1, 2, 5, 16)
    assert not attend_rows_native(query, states, states, torch.zeros(1, 5, dtype=torch.bool), 1.0).any()


@pytest.mark.parametrize("problem", ["dtype", "dense", "mask"])
def test_what_it_can_not_run_is_refused(problem):
    query, states, mask = torch.ones(1, 2, 16), torch.ones(1, 2, 5, 16), None
    if problem == "dtype":
        query = query.bfloat16()
    elif problem == "dense":
        states = torch.ones(1, 2, 16, 5).transpose(2, 3)
    else:
        mask = torch.zeros(1, 5)
    with pytest.raises(RuntimeError, match=problem):
        attend_rows_native(query, states, states, mask, 1.0)
