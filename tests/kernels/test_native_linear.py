"""The compiled base product: right for any shape, and a token's bits are the same in any batch."""

import pytest
import torch
from torch import Tensor

from loraplex.kernels.native import gated_linear_native, native_available

pytestmark = pytest.mark.skipif(not native_available(), reason="the compiled kernels can't be built here")

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
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 8e-3}[dtype] * expected.abs().max()
    assert (alone.double() - expected).abs().max() <= tolerance
    for num_tokens in (*range(2, 20), 64, 255, 300):
        assert torch.equal(product(x[:num_tokens], weight, bias), alone[:num_tokens]), num_tokens
