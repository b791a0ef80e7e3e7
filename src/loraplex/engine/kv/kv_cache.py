"""Keys and values of all sequences, in blocks, allocated once."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from loraplex.engine.kv.mask_rule import MaskRule
from loraplex.large_memory import large_buffer


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionTerms:
    """How one attention module turns queries and keys into weights."""

    scale: float
    mask_rule: MaskRule = field(default_factory=MaskRule)
    softcap: float | None = None
    sinks: Tensor | None = None  # [heads]  logits beside those of the keys, which take weight and give nothing

    def first_seen(self, position: int) -> int:
        """The position of the first token that a token sees."""
        return self.mask_rule.first(position)

    def seen(self, positions: Tensor, places: Tensor) -> Tensor:
        """Whether tokens at `positions` [.., 1] see keys at `places` [keys] of the same sequence."""
        seen = places <= positions
        if self.mask_rule.window is not None:
            seen &= places > positions - self.mask_rule.window
        if self.mask_rule.chunk is not None:
            seen &= places >= positions // self.mask_rule.chunk * self.mask_rule.chunk
        return seen


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerShape:
    """What one attention module keeps for a token, and how it attends."""

    terms: AttentionTerms

    num_kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        return self.num_kv_heads * (self.key_dim + self.value_dim) * self.dtype.itemsize


class KeyValueCache:
    """By attention module, keys and values [blocks, kv_heads, block_tokens, head_dim]."""

    def __init__(
        self,
        shapes: dict[nn.Module, LayerShape],
        num_blocks: int,
        block_tokens: int,
        device: torch.device,
    ) -> None:
        self.block_tokens = block_tokens
        self.num_blocks = num_blocks
        self.null_block = num_blocks  # which no sequence has: where the padding rows of recorded steps write
        self.shapes = shapes
        self.dtype = next(iter(shapes.values())).dtype
        self.layers: dict[nn.Module, tuple[Tensor, Tensor]] = {
            module: (
                _room((num_blocks + 1, s.num_kv_heads, block_tokens, s.key_dim), s.dtype, device),
                _room((num_blocks + 1, s.num_kv_heads, block_tokens, s.value_dim), s.dtype, device),
            )
            for module, s in shapes.items()
        }


def _room(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The system gives memory to what is written, so room that is never used costs nothing."""
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    return large_buffer(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)


def gather_blocks(pool: Tensor, blocks: Sequence[int] | Tensor) -> Tensor:
    """One sequence's keys or values [kv_heads, tokens, head_dim], in whole blocks."""
    index = blocks if isinstance(blocks, Tensor) else torch.tensor(blocks, device=pool.device)
    return pool[index].transpose(0, 1).flatten(1, 2)
