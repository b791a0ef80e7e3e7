"""Random residuals for tiny models, and ways to run rows through them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from loraplex.residual.calls import forward_scope, generation_scope
from loraplex.residual.layers import AttentionLayers
from loraplex.residual.modules import LinkedLayer, LinkedResidual, Residual, ResidualConfig, SteeringVector
from loraplex.residual.rows import ChainLink, RowAttention
from loraplex.residual.scope import AttentionScope, use_attention


def random_linked(
    layers: AttentionLayers,
    seed: int,
    *,
    r: int = 3,
    alpha: float = 6.0,
    at: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
) -> LinkedResidual:
    """A LinkedResidual as strong as the blocks that it joins, with heads weighed unevenly."""
    draw = torch.Generator().manual_seed(seed)
    hidden = layers.identity.hidden_size

    def normal(*shape: int, std: float) -> Tensor:
        return torch.randn(shape, generator=draw).mul(std).to(dtype)

    weights = {
        layer: LinkedLayer(
            a=normal(r, hidden, std=hidden**-0.5),
            b=normal(r, hidden, std=0.3),
            head_logits=normal(r, layers.num_heads[layer], std=1.0),
        )
        for layer in (layers.layers if at is None else at)
    }
    config = ResidualConfig(r=r, alpha=alpha, layers=None if at is None else tuple(at))
    return LinkedResidual(config=config, layers=weights, base=layers.identity)


def random_vector(layers: AttentionLayers, seed: int) -> SteeringVector:
    draw = torch.Generator().manual_seed(seed)
    hidden = layers.identity.hidden_size
    vectors = {layer: torch.randn(hidden, generator=draw).mul(0.3) for layer in layers.layers}
    return SteeringVector(vectors=vectors, base=layers.identity)


def row(chain: Mapping[str, tuple[Residual, float]] | None = None, **asked: Any) -> RowAttention:
    """A row through residuals by name, with their weights."""
    links = tuple(
        ChainLink(name=name, residual=residual, weight=weight) for name, (residual, weight) in (chain or {}).items()
    )
    return RowAttention(chain=links, **asked)


@torch.no_grad()
def forward(
    base: PreTrainedModel,
    layers: AttentionLayers,
    rows: Sequence[RowAttention],
    ids: Tensor,
    mask: Tensor | None = None,
    *,
    record_failures: bool = False,
    **inputs: Any,
) -> tuple[Any, AttentionScope]:
    """The base model's output and the scope that it ran in."""
    scope = forward_scope(rows, layers, ids.shape[1], mask, inputs, base, record_failures=record_failures)
    with use_attention(scope):
        return base(input_ids=ids, attention_mask=mask, **inputs), scope


def generate(
    base: PreTrainedModel,
    layers: AttentionLayers,
    rows: Sequence[RowAttention],
    ids: Tensor,
    mask: Tensor,
    **options: Any,
) -> tuple[Any, AttentionScope]:
    scope = generation_scope(rows, layers, ids.shape[1], mask, options, base)
    with use_attention(scope):
        return base.generate(ids, attention_mask=mask, **options), scope
