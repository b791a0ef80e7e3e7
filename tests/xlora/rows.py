"""Scalings to test with: seeded, of a softmax, over an embedding, blocks and an lm_head."""

import torch
from torch import Tensor

from loraplex.xlora.scalings.row_scalings import RowScalings

EXPERTS = ("protein", "materials", "chemistry")
PROJECTIONS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
BLOCKS = tuple(f"model.layers.{block}.{name}" for block in range(4) for name in PROJECTIONS)
LAYERS = ("model.embed_tokens", *BLOCKS, "lm_head")


def scalings_row(
    num_tokens: int = 5,
    *,
    layers: tuple[str, ...] = LAYERS,
    experts: tuple[str, ...] = EXPERTS,
    seed: int = 0,
    values: Tensor | None = None,
) -> RowScalings:
    if values is None:
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(num_tokens, len(layers), len(experts), generator=generator).softmax(dim=-1)
    token_ids = tuple(range(10, 10 + num_tokens))
    return RowScalings(mixture="science", experts=experts, layers=layers, token_ids=token_ids, values=values)
