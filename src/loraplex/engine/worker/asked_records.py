"""What one row asks of attention, as the compiled kernel reads it: the records of kernels/csrc/asked.h."""

import math
import struct
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from loraplex.engine.kv.residual_cache import ResidualCache
from loraplex.residual.modules import LinkedLayer, LinkedResidual, SteeringVector
from loraplex.residual.rows import RowAttention
from loraplex.residual.steering import Steering, log_strengths
from loraplex.validation import FLOAT32_MAX

RECORD_INTS = 3  # of a row and layer: addresses of its steering, its vectors' sum, its link


class PreparedWeights:
    """Factors of a linked residual at one layer, as the kernel reads them."""

    def __init__(self, layer: LinkedLayer) -> None:
        self.a, self.b = (factor.float().cpu().contiguous() for factor in (layer.a, layer.b))  # [rank, hidden]
        self.mix = torch.softmax(layer.head_logits.float(), dim=-1).t().contiguous().cpu()  # [heads, rank]


class WeightCache:
    """PreparedWeights of the residuals that are loaded, as they are now: tensors may be changed in place."""

    def __init__(self) -> None:
        self._prepared: WeakKeyDictionary[LinkedLayer, tuple[tuple[int, ...], PreparedWeights]] = WeakKeyDictionary()

    def get(self, layer: LinkedLayer) -> PreparedWeights:
        """Those of one layer; made when they are first asked for."""
        tensors = (layer.a, layer.b, layer.head_logits)
        versions = tuple(0 if tensor.is_inference() else tensor._version for tensor in tensors)
        known = self._prepared.get(layer)
        if known is None or known[0] != versions:
            known = self._prepared[layer] = (versions, PreparedWeights(layer))
        return known[1]


class RowRecords:
    """The records of one row. What they tell addresses of is kept as long as they are."""

    def __init__(self, row: RowAttention, cache: ResidualCache, weights: WeightCache) -> None:
        self._row, self._cache, self._weights = row, cache, weights
        self._kept: list[object] = []
        self._found: dict[int, tuple[int, int, int]] = {}
        self._steerings: dict[tuple[tuple[Steering, ...], int], int] = {}

    def at(self, layer: int, num_heads: int) -> tuple[int, int, int]:
        """The addresses of the row's steering, vectors and link at a layer; 0 is none."""
        if layer not in self._found:
            vector, link = self._link(layer)
            self._found[layer] = (self._steering(layer, num_heads), vector, link)
        return self._found[layer]

    def _steering(self, layer: int, num_heads: int) -> int:
        steerings = tuple(self._row.steering_at(layer))
        if not steerings:
            return 0
        key = (steerings, num_heads)
        if key not in self._steerings:
            self._steerings[key] = self._keep_ints(self._steering_ints(steerings, num_heads))
        return self._steerings[key]

    def _steering_ints(self, steerings: Sequence[Steering], num_heads: int) -> list[int]:
        factors = [steering for steering in steerings if steering.share is None]
        shares = [steering for steering in steerings if steering.share is not None]
        address, stride, num_keys = 0, 0, 0
        if factors:
            num_keys = max(stop for steering in factors for _, stop in steering.spans)
            rows = num_heads if any(steering.heads is not None for steering in factors) else 1
            strengths = log_strengths([(0, factors, 0)], 1, rows, 0, num_keys, torch.device("cpu"))
            address, stride = self._keep(strengths[0].contiguous()), num_keys if rows > 1 else 0
        ints = [address, stride, num_keys, len(shares)]
        for steering in shares:
            assert steering.share is not None, "chosen by its share"
            keys = steering.meant(0, max(stop for _, stop in steering.spans))
            heads = 0
            if steering.heads is not None:
                mask = torch.zeros(num_heads, dtype=torch.uint8)
                mask[list(steering.heads)] = 1
                heads = self._keep(mask)
            ints += [self._keep(keys.to(torch.uint8)), heads, len(keys), _bits(steering.share)]
        return ints

    def _link(self, layer: int) -> tuple[int, int]:
        """The addresses of the sum of the row's vectors at a layer, and of its link."""
        vectors: Tensor | None = None  # [hidden]
        before: list[Tensor] = []  # B of the residuals so far
        levels: list[int] = []
        for place, link in enumerate(self._row.chain_at(layer)):
            residual = link.residual
            if isinstance(residual, SteeringVector):
                own = residual.vectors[layer].cpu().double() * link.weight
                vectors = own if vectors is None else vectors + own
                continue
            assert isinstance(residual, LinkedResidual), "functions run outside of the kernel"
            weights = self._weights.get(residual.layers[layer])
            self._kept.append(weights)
            carried = constant = 0
            if before:
                carried = self._keep(weights.a @ torch.cat(before).t())
            if vectors is not None:
                constant = self._keep((weights.a.double() @ vectors).float())
            rank = len(weights.a)
            parts = self._cache.parts((layer, place), rank)
            self._kept.append(parts)
            addresses = self._keep_ints([part.data_ptr() for part in parts])
            factors = [factor.data_ptr() for factor in (weights.a, weights.b, weights.mix)]
            levels += [rank, *factors, carried, constant, addresses, _bits(link.weight * residual.config.scaling)]
            before.append(weights.b)
        vector = 0 if vectors is None else self._keep(vectors.float())
        if not before:
            return vector, 0
        return vector, self._keep_ints([len(before), sum(map(len, before)), *levels])

    def _keep_ints(self, ints: Sequence[int]) -> int:
        return self._keep(torch.tensor(ints, dtype=torch.int64))

    def _keep(self, tensor: Tensor) -> int:
        tensor = tensor.contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()


def _bits(value: float) -> int:
    """Of a float32; of infinity where a weight times alpha/r is beyond those, which is its own row's matter."""
    bounded = value if abs(value) <= FLOAT32_MAX else math.copysign(math.inf, value)
    return int(struct.unpack("<I", struct.pack("<f", bounded))[0])
