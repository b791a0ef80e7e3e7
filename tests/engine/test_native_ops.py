"""The compiled operators of packed passes against float64, and against what torch computes without them."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from loraplex.engine.kv.kv_cache import AttentionTerms
from loraplex.engine.kv.mask_rule import MaskRule
from loraplex.engine.worker import native_ops
from loraplex.kernels import native_parts
from loraplex.layers.fusion.activations import Activation

pytestmark = pytest.mark.needs("compiler")
# Of the largest value. A bfloat16 has 8 bits; some results are rounded twice, as torch does.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.2e-2}
DTYPES = list(TOLERANCE)


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_near(actual: Tensor, expected: Tensor) -> None:
    error = (actual.double() - expected).abs().max().item()
    assert error <= TOLERANCE[actual.dtype] * expected.abs().max().item(), f"off by {error:.1e}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [576, 64, 33, 7])
def test_rms_norm(dtype, size):
    x, weight = random(2, 5, size, dtype=dtype), random(size, dtype=dtype, seed=1)
    normed = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 1e-5)
    assert_near(native_parts.rms_norm(x, weight, 1e-5, False), normed * weight.double())
    assert_near(native_parts.rms_norm(x, weight, 1e-5, True), normed * (1 + weight.double()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [128, 64, 16, 6])
def test_rotary_positions(dtype, size):
    query, key = random(5, 4, size, dtype=dtype), random(5, 2, size, dtype=dtype, seed=1)
    cos, sin = random(5, size, dtype=dtype, seed=2), random(5, size, dtype=dtype, seed=3)

    def rotated(x: Tensor) -> Tensor:
        turned = torch.cat([-x[..., size // 2 :], x[..., : size // 2]], dim=-1)
        return x.double() * cos.double().unsqueeze(1) + turned.double() * sin.double().unsqueeze(1)

    expected = rotated(query), rotated(key)
    native_ops.rotate(query, key, cos, sin)
    assert_near(query, expected[0])
    assert_near(key, expected[1])


ACTIVATIONS = {
    Activation.SILU: F.silu,
    Activation.GELU: F.gelu,
    Activation.GELU_TANH: lambda x: F.gelu(x, approximate="tanh"),
    Activation.RELU: F.relu,
    Activation.SQUARED_RELU: lambda x: F.relu(x).square(),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1536, 40, 5])
@pytest.mark.parametrize(("kind", "reference"), ACTIVATIONS.items())
def test_activations_of_small_and_huge_values(dtype, size, kind, reference):
    gate, up = random(3, size, dtype=dtype) * 30, random(3, size, dtype=dtype, seed=1)
    gate[0, :3] = torch.tensor([-500.0, 500.0, 0.0])
    gate[1] /= 30
    plain, expected = gate.clone(), reference(gate.double())
    result = native_parts.activate(gate, up, kind)
    assert result.data_ptr() == gate.data_ptr()
    for row in range(3):
        assert_near(result[row], expected[row] * up[row].double())
        assert_near(native_parts.activate(plain[row].clone(), None, kind), expected[row])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [576, 33, 7])
def test_layer_norm(dtype, size):
    x, weight, bias = (random(2, 5, size, dtype=dtype, seed=seed) for seed in range(3))
    expected = F.layer_norm(x.double(), (size,), weight[0, 0].double(), bias[0, 0].double(), 1e-5)
    assert_near(native_parts.norm(x, weight[0, 0], bias[0, 0], 1e-5, True, False), expected)
    assert_near(native_parts.norm(x, None, None, 1e-5, True, False), F.layer_norm(x.double(), (size,)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_norm_with_weights_for_each_head(dtype):
    x, weight = random(3, 4, 16, dtype=dtype), random(4, 16, dtype=dtype, seed=1)
    expected = F.layer_norm(x.double(), (16,)) * weight.double()
    assert_near(native_parts.norm(x, weight, None, 1e-5, True, False), expected)


SHAPES = [  # head_dim of keys and of values, heads, kv_heads, block_tokens, sight, softcap, sinks
    (64, 64, 9, 3, 16, MaskRule(), None, None),
    (16, 16, 4, 2, 4, MaskRule(window=6), None, None),
    (16, 24, 4, 4, 8, MaskRule(), 5.0, None),
    (80, 160, 8, 1, 16, MaskRule(window=50), 30.0, None),
    (7, 5, 2, 1, 3, MaskRule(), None, None),
    (16, 16, 4, 2, 4, MaskRule(chunk=7), None, None),
    (16, 16, 4, 2, 4, MaskRule(chunk=5, window=3), None, [0.5, -2.0, 9.0, -1e4]),
    (16, 16, 4, 4, 4, MaskRule(), 2.0, [20.0, 0.0, 1.0, 2.0]),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_over_blocks(dtype, shape):
    key_dim, value_dim, heads, kv_heads, size, mask_rule, softcap, sinks = shape
    sinks = None if sinks is None else torch.tensor(sinks, dtype=dtype)
    terms = AttentionTerms(scale=0.3, mask_rule=mask_rule, softcap=softcap, sinks=sinks)
    num_blocks = 12
    keys = random(40, kv_heads, size, key_dim, dtype=dtype)
    values = random(40, kv_heads, size, value_dim, dtype=dtype, seed=1)
    table = torch.randperm(40, generator=torch.Generator().manual_seed(2))[:36].view(3, num_blocks).int()
    rows, positions = torch.tensor([2, 0, 1, 1]), torch.tensor([num_blocks * size - 1, 0, size + 1, 2])
    new_keys, new_values = (
        random(4, kv_heads, key_dim, dtype=dtype, seed=3),
        random(4, kv_heads, value_dim, dtype=dtype),
    )
    native_ops.store_tokens(new_keys, keys, table, rows, positions)
    native_ops.store_tokens(new_values, values, table, rows, positions)
    query, out = random(4, heads, key_dim, dtype=dtype, seed=4), torch.empty(4, heads, value_dim, dtype=dtype)
    native_ops.attend_single(query, out, keys, values, table, rows, positions, terms)
    for token in range(4):
        stop = int(positions[token]) + 1
        blocks = table[rows[token]].long()
        k, v = (pool[blocks].transpose(0, 1).flatten(1, 2)[:, :stop] for pool in (keys, values))
        assert torch.equal(k[:, -1], new_keys[token])
        assert torch.equal(v[:, -1], new_values[token])
        k, v = (states.double().repeat_interleave(heads // kv_heads, dim=0) for states in (k, v))
        logits = torch.einsum("hd,hpd->hp", query[token].double(), k) * 0.3
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        seen = [p for p in range(stop) if mask_rule.window is None or p > stop - 1 - mask_rule.window]
        seen = [p for p in seen if mask_rule.chunk is None or p // mask_rule.chunk == (stop - 1) // mask_rule.chunk]
        beside = logits.new_empty(heads, 0) if sinks is None else sinks.double().unsqueeze(1)
        weights = torch.cat([logits[:, seen], beside], dim=1).softmax(-1)[:, : len(seen)]
        expected = torch.einsum("hp,hpd->hd", weights, v[:, seen])
        for head in range(heads):
            assert_near(out[token, head], expected[head])


def test_a_tokens_attention_has_the_same_bits_in_any_batch():
    keys, values = random(8, 3, 16, 64, dtype=torch.float32), random(8, 3, 16, 64, dtype=torch.float32, seed=1)
    table = torch.arange(8, dtype=torch.int32).view(2, 4)
    rows, positions = torch.tensor([0, 1]), torch.tensor([60, 37])
    query = random(2, 9, 64, dtype=torch.float32, seed=2)
    terms = AttentionTerms(scale=0.125)
    both, alone = torch.empty(2, 9, 64), torch.empty(1, 9, 64)
    native_ops.attend_single(query, both, keys, values, table, rows, positions, terms)
    second = (query[1:].contiguous(), alone, keys, values, table, rows[1:].contiguous(), positions[1:].contiguous())
    native_ops.attend_single(*second, terms)
    assert torch.equal(both[1:], alone)


def test_places_outside_the_cache_are_refused():
    keys = random(4, 1, 4, 16, dtype=torch.float32)
    table = torch.full((1, 2), 9, dtype=torch.int32)
    states = random(1, 1, 16, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="doesn't exist"):
        native_ops.store_tokens(states, keys, table, torch.tensor([0]), torch.tensor([0]))
    with pytest.raises(RuntimeError, match="no block"):
        native_ops.store_tokens(states, keys, table, torch.tensor([0]), torch.tensor([8]))
