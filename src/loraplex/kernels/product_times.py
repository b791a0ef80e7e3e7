"""How long this machine takes for a linear product y = W x, by what computes it and by the number of tokens."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import cycle
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from loraplex.kernels.native import gated_linear_native
from loraplex.kernels.packed_weight import PackedWeight, no_adapters, packed_linear, packed_size
from loraplex.large_memory import LargeMemory

# compiled: ours, on the weight as it is; packed: ours, on a PackedWeight; onednn: oneDNN's, on a weight in its order.
Product = Literal["compiled", "torch", "packed", "onednn"]
ProductTimes = Mapping[Product, Sequence[float]]  # seconds of a call for each of TOKENS

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)

_POOL_BYTES = 2**27  # of weights that calls read in turn: more than caches hold, as in a model
_MAX_COLUMNS = 8192  # of a weight that is measured: a longer one's time is in proportion
_ROUNDS = 4  # through all products: others may work on the machine for a while
_ROUND_S = 0.0005  # in which a call is repeated
_MAX_CALLS = 4  # in a round
_LONG_S = 0.005  # after a call of this time, those of more tokens are taken to be in proportion
_ONEDNN_TOKENS = 32  # for which oneDNN orders a weight


class LinearShape(NamedTuple):
    """Of a weight [out, in]."""

    out_features: int
    in_features: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.in_features} to {self.out_features} {str(self.dtype).removeprefix('torch.')}"


def measure_products(shape: LinearShape) -> ProductTimes:
    """Time everything that computes such a product here: some tenths of a second."""
    columns = min(shape.out_features, _MAX_COLUMNS)
    with torch.inference_mode():
        calls = _calls(shape._replace(out_features=columns))
        times: dict[Product, list[float]] = {product: [] for product in calls}
        for tokens in TOKENS:
            _add_times(times, calls, torch.randn(tokens, shape.in_features).to(shape.dtype))
    factor = shape.out_features / columns
    return {product: [seconds * factor for seconds in of_product] for product, of_product in times.items()}


Call = Callable[[Tensor], object]


def _calls(shape: LinearShape) -> dict[Product, Call]:
    """What computes y for x [tokens, in], with other weights at each call."""
    out, in_, dtype = shape
    number = max(2, _POOL_BYTES // (out * in_ * dtype.itemsize))
    pool = _random(number * packed_size(out, in_), dtype)
    plain = [pool[i * out * in_ :][: out * in_].view(out, in_) for i in range(number)]
    none = no_adapters()
    calls: dict[Product, Call] = {
        "compiled": _in_turn(plain, lambda x, w: gated_linear_native(x, w, None, *none)),
        "torch": _in_turn(plain, functional.linear),
    }
    if dtype == torch.bfloat16:
        packed = [PackedWeight(part, out, in_) for part in pool.split(packed_size(out, in_))[:number]]
        calls["packed"] = _in_turn(packed, lambda x, w: packed_linear(x, w, None))
    if _has_onednn(dtype):
        onednn = torch.ops.mkldnn
        ordered = [onednn._reorder_linear_weight(weight, _ONEDNN_TOKENS) for weight in plain]
        calls["onednn"] = _in_turn(ordered, lambda x, w: onednn._linear_pointwise(x, w, None, "none", [], ""))
    return calls


def _has_onednn(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype != torch.bfloat16 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _in_turn(weights: Sequence[Tensor], run: Callable[..., object]) -> Call:
    turns: Iterator[Tensor] = cycle(weights)
    return lambda x: run(x, next(turns))


def _random(size: int, dtype: torch.dtype) -> Tensor:
    """In memory as a model's weights have it."""
    part = torch.randn(min(size, 2**20)).to(dtype)
    return LargeMemory().keep(part.repeat(-(-size // part.numel())))


def _add_times(times: dict[Product, list[float]], calls: Mapping[Product, Call], x: Tensor) -> None:
    """The next time of every product, for the tokens of x: those of the table, in their order."""
    best: dict[Product, float] = {}
    for product, before in times.items():
        if before and before[-1] > _LONG_S:
            best[product] = before[-1] * len(x) / TOKENS[len(before) - 1]
    measured = [product for product in calls if product not in best]
    for _ in range(_ROUNDS):
        for product in measured:
            best[product] = min(best.get(product, float("inf")), _fastest(calls[product], x))
    for product, seconds in best.items():
        times[product].append(seconds)


def _fastest(run: Call, x: Tensor) -> float:
    """Seconds of one of some calls."""
    times: list[float] = []
    while sum(times) < _ROUND_S and len(times) < _MAX_CALLS:
        start = time.perf_counter()
        run(x)
        times.append(time.perf_counter() - start)
    return min(times)
