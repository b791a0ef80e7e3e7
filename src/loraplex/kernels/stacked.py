"""All active adapters stacked into one pair of matrices, gated by a mask in rank space.

For few tokens without the compiled kernel: two matrix products a layer, whatever the number of adapters.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from loraplex.kernels.segments import LoraSegment


class LoraStack(NamedTuple):
    """The distinct adapters of some segments side by side, and every token's gates over their rank rows."""

    lora_a: Tensor  # [total_rank, in]
    lora_b: Tensor  # [total_rank, out]
    gates: Tensor  # [tokens, total_rank]


def stack_segments(segments: Sequence[LoraSegment], num_tokens: int, *, known: LoraStack | None = None) -> LoraStack:
    """Stack the segments' distinct adapters; gates are zero outside an adapter's own tokens.

    `known` is an earlier stack of the same segments with other gates: its factors are used again.
    """
    distinct = {id(segment.lora_a): segment for segment in segments}
    first_row, total_rank = {}, 0
    for key, segment in distinct.items():
        first_row[key] = total_rank
        total_rank += segment.lora_a.shape[0]
    like = segments[0].lora_a
    gates = torch.zeros(num_tokens, total_rank, dtype=like.dtype, device=like.device)
    for segment in segments:
        rows = slice(first_row[id(segment.lora_a)], first_row[id(segment.lora_a)] + segment.lora_a.shape[0])
        gate = segment.gates if isinstance(segment.gates, float) else segment.gates.to(gates.dtype).unsqueeze(-1)
        gates[segment.start : segment.stop, rows] += gate
    return LoraStack(
        lora_a=torch.cat([segment.lora_a for segment in distinct.values()]) if known is None else known.lora_a,
        lora_b=torch.cat([segment.lora_b for segment in distinct.values()]) if known is None else known.lora_b,
        gates=gates,
    )


def gated_lora_stacked(y: Tensor, x: Tensor, stack: LoraStack) -> Tensor:
    """Add the gated adapters to `y` in place: y += (gates * (x lora_a^T)) lora_b."""
    hidden = x.reshape(-1, x.shape[-1]) @ stack.lora_a.t()
    y.view(-1, y.shape[-1]).addmm_(hidden.mul_(stack.gates), stack.lora_b)
    return y
