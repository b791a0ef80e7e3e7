"""The compiled base product: right for any shape, and a token's bits are the same in any batch."""

import pytest
import torch
from torch import Tensor

from loraplex.kernels.native import gated_linear_native
from loraplex.kernels.segments import LoraSegment
from tests.kernels.rounding import Sizes, excess, output_sizes

pytestmark = pytest.mark.needs("compiler")

WIDTHS = (1, 15, 31, 64, 576, 1025, 2500)  # parts of a row, whole and not, and the rest of a step
NUM_OUT = 37  # a whole block of weight rows, and single ones


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    table, scalings = torch.zeros(1, 1, 3, dtype=torch.int64), torch.zeros(1, 1)
    no_segments = torch.zeros(0, 4, dtype=torch.int64)
    return gated_linear_native(x, weight, bias, table, scalings, 0, no_segments, torch.zeros(0))


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_right_and_the_same_alone(dtype: torch.dtype, width: int, with_bias: bool) -> None:
    torch.manual_seed(width)
    weight = torch.randn(NUM_OUT, width).to(dtype)
    bias = torch.randn(NUM_OUT).to(dtype) if with_bias else None
    x = torch.randn(300, width).to(dtype)
    alone = torch.cat([product(row.unsqueeze(0), weight, bias) for row in x])
    expected = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    terms = x.double().abs() @ weight.double().abs().t() + (0 if bias is None else bias.double().abs())
    assert excess(alone, expected, Sizes(terms, expected.abs())) <= 1
    for num_tokens in (*range(2, 20), 64, 255, 300):
        assert torch.equal(product(x[:num_tokens], weight, bias), alone[:num_tokens]), num_tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_are_right_however_many_threads_share_them(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    width, counts, ranks = 200, (1, 70, 1, 33, 1, 2), (9, 3, 64, 16, 1, 8)
    x, weight = torch.randn(sum(counts), width).to(dtype), torch.randn(NUM_OUT, width).to(dtype)
    factors = [(torch.randn(rank, width).to(dtype), torch.randn(rank, NUM_OUT).to(dtype)) for rank in ranks]
    table = torch.tensor([[(a.data_ptr(), b.data_ptr(), len(a))] for a, b in factors])
    stops = torch.tensor(counts).cumsum(0).tolist()
    segments = torch.tensor(
        [(stop - count, stop, slot, stop - count) for slot, (count, stop) in enumerate(zip(counts, stops, strict=True))]
    )
    gates = torch.rand(sum(counts))
    gates[5] = 0
    expected = x.double() @ weight.double().t()
    loras = [
        LoraSegment(start, stop, a, b, 0.5 * gates[start:stop])
        for (start, stop, _, _), (a, b) in zip(segments.tolist(), factors, strict=True)
    ]
    terms = output_sizes(x.double().abs() @ weight.double().abs().t(), x, loras).terms
    sizes = Sizes(terms, output_sizes(expected, x, loras).kept)
    for s in loras:
        hidden = s.gates[:, None].double() * (x[s.start : s.stop].double() @ s.lora_a.double().t())
        expected[s.start : s.stop] += hidden @ s.lora_b.double()
    scalings, before, results = torch.full((len(ranks), 1), 0.5), torch.get_num_threads(), []
    try:
        for num_threads in (1, 2, 3, 5):
            torch.set_num_threads(num_threads)
            results.append(gated_linear_native(x, weight, None, table, scalings, 0, segments, gates))
    finally:
        torch.set_num_threads(before)
    assert excess(results[0], expected, sizes) <= 1
    for result in results[1:]:
        assert torch.equal(result, results[0])
