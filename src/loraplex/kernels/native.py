"""The compiled CPU kernel: built once with the machine's C++ compiler, cached, and never required."""

import logging
import threading
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from loraplex.environment import switch, variable
from loraplex.kernels import library
from loraplex.kernels.packed_weight import PackedWeight, packed_linear

logger = logging.getLogger(__name__)

_BUILD_LOCK = threading.Lock()
SUPPORTED_DTYPES = (torch.float32, torch.bfloat16)


def native_available() -> bool:
    """Whether the compiled kernel can run here; the first call builds it (some 10 s) or loads it from the cache.

    LORAPLEX_NATIVE=0 turns it off. Without it the torch kernels do the same work.
    """
    with _BUILD_LOCK:
        return _load()


def gated_lora_native(
    y: Tensor,  # [.., out]  contiguous, of x's dtype or float32, changed in place
    x: Tensor,  # [.., in]  contiguous
    table: Tensor,  # [slots, modules, 3]  int64: addresses of lora_a and lora_b, rank
    scalings: Tensor,  # [slots, modules]  float32
    module: int,
    segments: Tensor,  # [n, 4]  int64: start, stop, slot, first gate
    gates: Tensor,  # [..]  float32
    routing: Sequence[Tensor] = (),  # what predicts gates in the call: RoutingPlan.routing
) -> Tensor:
    """Add every segment's adapter: y[t] += gates[t] * scaling * lora_b^T lora_a x[t]."""
    torch.ops.loraplex.gated_lora_.default(y, x, table, scalings, module, segments, gates, routing)
    return y


def gated_linear_native(
    x: Tensor,  # [.., in]  contiguous
    weight: Tensor,  # [out, in]  contiguous, of x's dtype; or a PackedWeight
    bias: Tensor | None,  # [out]
    table: Tensor,
    scalings: Tensor,
    module: int,
    segments: Tensor,
    gates: Tensor,
    routing: Sequence[Tensor] = (),
    *,
    float_sums: bool = False,
) -> Tensor:  # [.., out]  of x's dtype, or float32 with `float_sums`: what would be rounded to it
    """The base product and the adapters in one call: W x[t] + bias + the sum that `gated_lora_native` adds.

    For few tokens: the weights are read once for all of them, and a token's result has the same bits in any batch.
    """
    if isinstance(weight, PackedWeight):
        adapters = (table, scalings, module, segments, gates, routing)
        return packed_linear(x, weight, bias, adapters, float_sums=float_sums)
    return _gated_linear()(x, weight, bias, table, scalings, module, segments, gates, routing, float_sums)


def attend_rows_native(
    query: Tensor,  # [rows, heads, dim]  contiguous
    keys: Tensor,  # [rows, kv_heads, places, dim]  dense along their places
    values: Tensor,
    mask: Tensor | None,  # [rows, places]  bool, true where a place is seen
    scale: float,
) -> Tensor:  # [rows, heads, dim]
    """softmax(scale * q k^T) v for one query a row; a row's bits don't depend on the others."""
    return _attend_rows()(query, keys, values, mask, scale)


def place_factors_native(values: Tensor, factors: Tensor, out: Tensor) -> None:
    """Copy factors from a file's values to `out`, A as it is and B transposed, without Python's lock.

    factors [modules, 6] int64: place in out, rank, places of A [rank, in] and B [out, rank] in values, in, out.
    """
    torch.ops.loraplex.place_factors_.default(values, factors, out)


@cache
def _attend_rows() -> Callable[..., Tensor]:
    return torch.ops.loraplex.attend_rows.default


@cache
def _gated_linear() -> Callable[..., Tensor]:
    """The operator itself: finding it by name costs some microseconds, and a step calls it for every module."""
    return torch.ops.loraplex.gated_linear.default


@cache
def _load() -> bool:
    if not switch("LORAPLEX_NATIVE", default=True):
        logger.info("the compiled CPU kernel is turned off by LORAPLEX_NATIVE; torch kernels are used")
        return False
    try:
        path = library.library_path()
        if not library.is_whole(path):  # a whole one needs no compiler
            library.build(path, variable("CXX", "c++"))
        library.load(path)
    except Exception as error:  # a broken toolchain fails in many ways, none of which may stop the model
        logger.warning("no compiled CPU kernel, torch kernels are used, which decode more slowly: %s", error)
        return False
    return True
