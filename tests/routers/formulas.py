"""What routers of all kinds do, in float64 and token by token: from docs/xlora.md, without their code."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from loraplex.routers.config import (
    ArrowConfig,
    LinearRouterConfig,
    RouterConfig,
    SpectrConfig,
    StaticRouterConfig,
)

Factors = tuple[Tensor, Tensor]  # A [rank, in] and B [rank, out]


def scores_of(
    config: RouterConfig,
    x: Tensor,  # [in]
    experts: Sequence[Factors | None],  # None: doesn't adapt the module
    rows: Tensor | None = None,  # [experts, in], of a linear router
    biases: Tensor | None = None,  # [experts]
) -> list[float]:
    """One token's scores; 0 for an expert that isn't there."""
    scores, x = [], x.double()
    for i, factors in enumerate(experts):
        if factors is None:
            scores.append(0.0)
            continue
        a, b = (each.double() for each in factors)
        if isinstance(config, ArrowConfig):
            scores.append(abs(float(direction(a, b, config.rng_seed) @ x)))
        elif isinstance(config, SpectrConfig):
            scores.append(float((b.t() @ (a @ x)).norm()))
        else:
            assert rows is not None, "a linear router has weights"
            assert biases is not None, "a linear router has biases"
            scores.append(float(rows[i].double() @ x + biases[i].double()))
    return scores


def direction(a: Tensor, b: Tensor, seed: int) -> Tensor:  # [in]
    """PEFT's power method: the first right singular vector of B A, as far as 15 steps get from its random start."""
    v = torch.randn(a.shape[1], generator=torch.Generator().manual_seed(seed)).double()
    for _ in range(15):
        v = a.t() @ (b @ (b.t() @ (a @ (v / v.norm()))))
    return v / v.norm()


def gates_of(config: RouterConfig, scores: Sequence[float], present: Sequence[bool]) -> list[float]:
    """One token's gates; experts that aren't there can't be chosen."""
    assert not isinstance(config, StaticRouterConfig), "static gates need no scores"
    gates = [0.0] * len(scores)
    order = sorted((i for i in range(len(scores)) if present[i]), key=lambda i: -scores[i])
    kept = order if config.top_k is None else order[: config.top_k]
    if isinstance(config, LinearRouterConfig) and config.activation == "sigmoid":
        for i in kept:
            gates[i] = 1 / (1 + math.exp(-scores[i] / config.temperature))
        return gates
    shares = {i: math.exp((scores[i] - scores[order[0]]) / config.temperature) for i in kept}
    if isinstance(config, LinearRouterConfig) and config.top_p is not None:
        total, before = sum(shares.values()), 0.0
        for i in kept:
            share = shares[i]
            if before >= config.top_p * total:
                del shares[i]
            before += share
    for i, share in shares.items():
        gates[i] = share / sum(shares.values())
    return gates
