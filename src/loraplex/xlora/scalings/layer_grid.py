"""Mean scalings of LoRA layers, ordered by projection and block."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loraplex.xlora.scalings.row_scalings import block_key, short_labels


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerGrid:
    """A table of LoRA layers; NaN where no expert adapts the module."""

    projections: tuple[str, ...]
    blocks: tuple[str, ...]  # a block's number; for a LoRA layer outside of blocks, its name
    values: Tensor  # [projections, blocks, experts]
    means: Tensor  # [blocks, experts]  over the LoRA layers of the block


def layer_grid(layers: Sequence[str], means: Tensor) -> LayerGrid:
    """Order `means` [lora_layers, experts]; a LoRA layer outside of blocks fills its column.

    Modules of one name in one block (the gates of a mixture of feed-forward experts) are averaged.
    """
    keys = [block_key(path) for path in layers]
    names = [path.rpartition(".")[2] for path in layers]
    blocks = list(dict.fromkeys(keys))
    inside = [name for name, path, key in zip(names, layers, keys, strict=True) if path != key]
    projections = list(dict.fromkeys(inside)) or ["module"]
    values = torch.full((len(projections), len(blocks), means.shape[1]), torch.nan)
    for column, block in enumerate(blocks):
        if block in layers:
            values[:, column] = means[list(layers).index(block)]
            continue
        for row, projection in enumerate(projections):
            members = [
                i for i, (key, name) in enumerate(zip(keys, names, strict=True)) if (key, name) == (block, projection)
            ]
            if members:
                values[row, column] = means[members].mean(dim=0)
    by_block = [means[[i for i, key in enumerate(keys) if key == block]].mean(dim=0) for block in blocks]
    return LayerGrid(
        projections=tuple(projections), blocks=short_labels(blocks), values=values, means=torch.stack(by_block)
    )
