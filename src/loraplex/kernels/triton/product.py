"""The matrix product of the kernels, with sums in float32."""

import triton
import triton.language as tl

from loraplex.kernels.triton.available import is_interpreted

_INTERPRETED = tl.constexpr(is_interpreted())


@triton.jit
def add_product(total, a, b):
    """total + a b; float32 factors are multiplied as they are, without rounding to TF32."""
    if _INTERPRETED:  # numpy, which it runs on, has no bfloat16: exact in float32, as on a GPU
        return total + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, total, input_precision="ieee")
