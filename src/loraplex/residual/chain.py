"""Residuals in the order of their links, at one layer."""

import torch
from torch import Tensor

from loraplex.residual.attention_weights import AttentionWeights
from loraplex.residual.cache import ResidualStates
from loraplex.residual.links import Extend, ResidualTerm
from loraplex.residual.plan import LayerPlan


def run_chain(
    plan: LayerPlan,
    layer: int,
    x: Tensor,  # [sequences, tokens, hidden]  the attention block's normed input
    weights: AttentionWeights,
    state: ResidualStates | None,
) -> Tensor:  # [rows, tokens, hidden]
    """The sum of each row's residuals: the j-th of a link reads x plus the residuals of those before it."""
    chosen = x if plan.index is None else x[plan.index]
    chosen = chosen.to(torch.promote_types(x.dtype, torch.float32))
    total: Tensor | None = None
    for position, parts in enumerate(plan.links):
        read = chosen if total is None else chosen + total
        added = None if len(parts) == 1 and parts[0].index is None else torch.zeros_like(read)
        for part in parts:
            extend = _extender(plan, part, (layer, position), weights, state)
            residual = part.run(read if part.index is None else read[part.index], weights, extend)
            added = residual if added is None else added.index_add(0, _places(part, plan), residual)
        assert added is not None, "a place in the links has at least one residual"
        total = added if total is None else total + added
    assert total is not None, "run_chain needs links"
    return total


def _places(part: ResidualTerm, plan: LayerPlan) -> Tensor:
    if part.index is not None:
        return part.index
    return torch.arange(plan.sequences.numel(), device=plan.sequences.device)


def _extender(
    plan: LayerPlan, part: ResidualTerm, key: tuple[int, int], weights: AttentionWeights, state: ResidualStates | None
) -> Extend:
    def extend(u: Tensor) -> Tensor:  # [rows, tokens, rank] -> [rows, keys, rank]
        if state is not None:
            u = state.extend(key, plan.sequences if part.index is None else plan.sequences[part.index], u)
        missing = weights.num_keys - u.shape[1]
        if missing > 0:  # keys on the left that the mask hides from these rows: another row's prefix, an empty column
            return torch.nn.functional.pad(u, (0, 0, missing, 0))
        return u[:, -missing:] if missing < 0 else u  # a sliding window's cache forgets the earliest keys

    return extend
