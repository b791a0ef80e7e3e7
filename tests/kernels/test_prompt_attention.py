"""The compiled attention of prompts against float64: any part of a prompt, sizes, windows, caps and sinks."""

import math

import pytest
import torch
from torch import Tensor

from loraplex.kernels.native import native_available

pytestmark = pytest.mark.needs("compiler")

ERROR = 4e-3  # of the largest value: weights and results are rounded to bfloat16
CASES = {
    "from the beginning": {"heads": 9, "kv_heads": 3, "dims": (64, 64), "start": 0, "count": 40},
    "behind others": {"heads": 9, "kv_heads": 3, "dims": (64, 64), "start": 37, "count": 70},
    "many keys": {"heads": 2, "kv_heads": 1, "dims": (64, 64), "start": 1500, "count": 65},
    "odd sizes": {"heads": 4, "kv_heads": 1, "dims": (24, 40), "start": 1000, "count": 33, "block_tokens": 5},
    "wide heads": {"heads": 2, "kv_heads": 1, "dims": (256, 256), "start": 3, "count": 18},
    "one token": {"heads": 2, "kv_heads": 2, "dims": (16, 16), "start": 99, "count": 1},
    "window": {"heads": 4, "kv_heads": 4, "dims": (128, 128), "start": 700, "count": 50, "window": 50},
    "window of one": {"heads": 2, "kv_heads": 2, "dims": (32, 32), "start": 10, "count": 40, "window": 1},
    "chunks": {"heads": 4, "kv_heads": 2, "dims": (64, 64), "start": 50, "count": 100, "chunk": 32},
    "soft cap": {"heads": 4, "kv_heads": 2, "dims": (80, 80), "start": 64, "count": 100, "softcap": 5.0},
    "sinks": {"heads": 4, "kv_heads": 2, "dims": (64, 64), "start": 50, "count": 100, "window": 7, "with_sinks": True},
}


@pytest.fixture(params=range(4), ids=["plain", "vectors", "tiles", "emulated"])
def tiling(request):
    assert native_available()
    if request.param != 3 and request.param > torch.ops.loraplex.tiling():
        pytest.skip("not on this machine")
    return request.param


class Prompt:
    """A sequence in scattered blocks, whose other places are NaN, and what attention of its last tokens should give."""

    def __init__(
        self,
        heads,
        kv_heads,
        dims,
        start,
        count,
        *,
        block_tokens=16,
        window=0,
        chunk=0,
        softcap=0.0,
        with_sinks=False,
        size=1.0,
    ) -> None:
        torch.manual_seed(0)
        length, (key_dim, value_dim) = start + count, dims
        self.keys, self.values = torch.randn(length, kv_heads, key_dim), torch.randn(length, kv_heads, value_dim)
        self.query = (torch.randn(count, heads, key_dim) * size).bfloat16()
        self.keys, self.values = self.keys.bfloat16(), self.values.bfloat16()
        self.sinks = torch.randn(heads) if with_sinks else None
        self.start, self.softcap, self.scale, self.rule = start, softcap, key_dim**-0.5, (window, chunk)
        num_blocks = -(-length // block_tokens)
        order = torch.randperm(2 * num_blocks)[:num_blocks]
        self.table = torch.zeros(3, num_blocks + 1, dtype=torch.int32)
        self.table[1, :num_blocks] = order
        self.pools = [self._pool(states, order, block_tokens) for states in (self.keys, self.values)]

    def _pool(self, states: Tensor, order: Tensor, block_tokens: int) -> Tensor:
        pool = torch.full((2 * len(order), states.shape[1], block_tokens, states.shape[2]), math.nan).bfloat16()
        positions = torch.arange(len(states))
        pool[order[positions // block_tokens], :, positions % block_tokens] = states
        return pool

    def attend(self, tiling: int) -> Tensor:
        out = self.query.new_full((*self.query.shape[:2], self.values.shape[2]), math.nan)
        where = (self.table, 1, self.start)
        terms = (self.scale, *self.rule, self.softcap, self.sinks)
        torch.ops.loraplex.attend_prompt_(self.query, out, *self.pools, *where, *terms, tiling)
        return out

    def expected(self) -> Tensor:
        groups = self.query.shape[1] // self.keys.shape[1]
        query, keys, values = (states.double().transpose(0, 1) for states in (self.query, self.keys, self.values))
        logits = query @ keys.repeat_interleave(groups, 0).transpose(1, 2) * self.scale
        if self.softcap:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        window, chunk = self.rule
        position, key = self.start + torch.arange(len(self.query)).unsqueeze(1), torch.arange(len(self.keys))
        seen = key <= position
        if window:
            seen &= key > position - window
        if chunk:
            seen &= key // chunk == position // chunk
        logits = logits.masked_fill(~seen, -math.inf)
        if self.sinks is not None:
            logits = torch.cat([logits, self.sinks.double().view(-1, 1, 1).expand(-1, len(position), 1)], dim=-1)
        weights = torch.softmax(logits, dim=-1)[..., : len(self.keys)]
        return (weights @ values.repeat_interleave(groups, 0)).transpose(0, 1)


@pytest.mark.parametrize("case", CASES)
def test_right(case, tiling):
    prompt = Prompt(**CASES[case])
    expected = prompt.expected()
    assert (prompt.attend(tiling).double() - expected).abs().max() <= ERROR * expected.abs().max()


def test_large_logits(tiling):
    prompt = Prompt(heads=4, kv_heads=2, dims=(64, 64), start=600, count=70, size=200.0)
    expected = prompt.expected()
    assert (prompt.attend(tiling).double() - expected).abs().max() <= ERROR * expected.abs().max()


def test_threads_change_nothing(tiling):
    prompt, before, results = Prompt(**CASES["behind others"]), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(prompt.attend(tiling))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_wrong_arguments_are_refused():
    prompt = Prompt(**CASES["one token"])
    prompt.start = 10_000
    with pytest.raises(RuntimeError, match="no block"):
        prompt.attend(-1)
    prompt = Prompt(**CASES["one token"])
    prompt.table[1, 0] = 77
    with pytest.raises(RuntimeError, match="doesn't exist"):
        prompt.attend(-1)
    prompt = Prompt(**CASES["one token"])
    prompt.query = prompt.query.float()
    with pytest.raises(RuntimeError, match="dtype"):
        prompt.attend(-1)
