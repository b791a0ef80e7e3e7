"""Segments that share products: the sums and gradients of a product for each, and only where they may share."""

import pytest
import torch
from torch import Tensor

from loraplex.kernels.batched_segments import equal_parts
from loraplex.kernels.segmented import _SegmentedLora, gated_lora_segmented
from loraplex.kernels.segments import LoraSegment

IN, OUT = 24, 40


def factors(ranks: list[int], dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    return [
        (torch.randn(r, IN, dtype=dtype, requires_grad=True), torch.randn(r, OUT, dtype=dtype, requires_grad=True))
        for r in ranks
    ]


def by_one(y: Tensor, x: Tensor, segments: list[LoraSegment]) -> Tensor:
    given = [tensor for segment in segments for tensor in (segment.lora_a, segment.lora_b, segment.gates)]
    return _SegmentedLora.apply(y, x, segments, *given)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cuts", [(0, 6, 12, 18), (2, 8, 20, 26), (0, 12, 18, 30)])
@pytest.mark.parametrize("ranks", [[4, 4, 4], [2, 5, 3]])
def test_sums_and_gradients_are_those_of_a_product_for_each(
    dtype: torch.dtype, cuts: tuple[int, ...], ranks: list[int]
) -> None:
    own = torch.float32 if dtype == torch.bfloat16 else dtype  # as adapters in training are
    pairs = factors(ranks, own)
    gates = torch.randn(cuts[2] - cuts[1], dtype=own, requires_grad=True)
    x = torch.randn(2, 15, IN).to(dtype).requires_grad_()
    start, weights = torch.randn(2, 15, OUT).to(dtype), torch.randn(2, 15, OUT).to(dtype)
    segments = [
        LoraSegment(first, stop, *pair, gate)
        for first, stop, pair, gate in zip(cuts, cuts[1:], pairs, (0.5, gates, 2.0), strict=False)
    ]
    assert equal_parts(segments) is not None
    leaves = [x, gates, *(factor for pair in pairs for factor in pair)]
    told = []
    for run in (gated_lora_segmented, by_one):
        y = run(start.clone().requires_grad_() * 1.0, x, segments)
        told.append([y.detach(), *torch.autograd.grad((y * weights).sum(), leaves)])
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for ours, theirs in zip(*told, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def test_gradients_pass_gradcheck() -> None:
    pairs = factors([2, 3], torch.float64)
    x, y = (torch.randn(6, n, dtype=torch.float64, requires_grad=True) for n in (IN, OUT))
    gates = torch.randn(4, dtype=torch.float64, requires_grad=True)

    def run(y: Tensor, x: Tensor, gates: Tensor, *flat: Tensor) -> Tensor:
        segments = [LoraSegment(0, 2, flat[0], flat[1], 0.5), LoraSegment(2, 6, flat[2], flat[3], gates)]
        assert equal_parts(segments) is not None
        return gated_lora_segmented(y * 1.0, x, segments)

    assert torch.autograd.gradcheck(run, (y, x, gates, *(factor for pair in pairs for factor in pair)))


def segment(start: int, stop: int, gates: Tensor | float = 1.0, dropout: float = 0.0) -> LoraSegment:
    return LoraSegment(start, stop, torch.ones(2, IN), torch.ones(2, OUT), gates, dropout)


@pytest.mark.parametrize(
    "segments",
    [
        [segment(0, 4)],
        [segment(0, 4), segment(5, 9)],
        [segment(0, 4), segment(0, 4)],
        [segment(0, 4), segment(4, 8, dropout=0.1)],
        [segment(0, 4), segment(4, 8, torch.ones(4, 2))],
        [segment(0, 31), segment(31, 67)],
    ],
    ids=["one", "a gap", "the same tokens", "dropout", "gates of ranks", "no common length"],
)
def test_other_segments_have_products_of_their_own(segments: list[LoraSegment]) -> None:
    assert equal_parts(segments) is None


def test_a_segment_has_the_same_bits_beside_others_where_nothing_trains() -> None:
    pairs = [(a.detach(), b.detach()) for a, b in factors([3, 5], torch.float32)]
    x, y = torch.randn(8, IN), torch.randn(8, OUT)
    both = gated_lora_segmented(y.clone(), x, [LoraSegment(4 * i, 4 * i + 4, *pairs[i], 0.5) for i in range(2)])
    for i in range(2):
        own = slice(4 * i, 4 * i + 4)
        assert torch.equal(both[own], gated_lora_segmented(y[own].clone(), x[own], [LoraSegment(0, 4, *pairs[i], 0.5)]))


def test_a_diverged_neighbour_leaves_gradients_finite() -> None:
    pairs = factors([3, 3, 3], torch.float32)
    x = torch.randn(24, IN)
    x[:6] = torch.inf
    segments = [LoraSegment(*cut, *pair, 1.0) for cut, pair in zip(((0, 6), (6, 18), (18, 24)), pairs, strict=True)]
    assert equal_parts(segments) is not None
    flat = [factor for pair in pairs for factor in pair]
    grads = torch.autograd.grad(gated_lora_segmented(torch.zeros(24, OUT), x, segments).sum(), flat)
    assert [bool(grad.isfinite().all()) for grad in grads] == [False] * 2 + [True] * 4
