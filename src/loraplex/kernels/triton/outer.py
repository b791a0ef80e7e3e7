"""Gradients of the factors: for every segment, what its tokens are in rank space times what they are outside."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from loraplex.kernels.triton.product import add_product
from loraplex.kernels.triton.shrink import rank_block
from loraplex.kernels.triton.tuning import LAUNCHING, tuned


@tuned("BLOCK_FEATURES", (64, 128), key=("num_features", "BLOCK_RANK", "BLOCK_TOKENS"))
@triton.jit
def outer_kernel(
    hidden,  # [rows, width]  float32
    x,  # [tokens, features]
    segments,  # [segments, 4]  int64: first token, tokens, rank, first row
    offsets,  # [segments]  int64: where a segment's gradient begins
    grads,  # float32, [rank, features] of each segment one after the other; written
    num_features,
    width,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
):
    """grads[r, f] = sum over the segment's tokens of hidden[row, r] * x[t, f]."""
    segment = segments + tl.program_id(0) * 4
    first_rank = tl.program_id(2) * BLOCK_RANK
    rank = tl.load(segment + 2).to(tl.int32)
    if first_rank >= rank:
        return
    start, num_tokens, first_row = tl.load(segment), tl.load(segment + 1).to(tl.int32), tl.load(segment + 3)
    ranks = first_rank + tl.arange(0, BLOCK_RANK)
    features = tl.program_id(1) * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)
    is_rank, is_feature = ranks < rank, features < num_features
    total = tl.zeros((BLOCK_RANK, BLOCK_FEATURES), dtype=tl.float32)
    for first in range(0, num_tokens, BLOCK_TOKENS):
        tokens = first + tl.arange(0, BLOCK_TOKENS)
        is_token = tokens < num_tokens
        states = tl.load(
            hidden + (first_row + tokens)[:, None] * width + ranks[None, :],
            mask=is_token[:, None] & is_rank[None, :],
            other=0.0,
        )
        x_part = tl.load(
            x + (start + tokens)[:, None] * num_features + features[None, :],
            mask=is_token[:, None] & is_feature[None, :],
            other=0.0,
        )
        total = add_product(total, tl.trans(states.to(x_part.dtype)), x_part)
    places = tl.load(offsets + tl.program_id(0)) + ranks.to(tl.int64)[:, None] * num_features + features[None, :]
    tl.store(grads + places, total, mask=is_rank[:, None] & is_feature[None, :])


def outer(
    hidden: Tensor,  # [rows, width]  float32
    x: Tensor,  # [tokens, features]  contiguous
    segments: Sequence[tuple[int, int, int, int]],  # first token, tokens, rank, first row
    max_rank: int,
) -> list[Tensor]:  # [rank, features] each, float32
    """Every segment's product of its tokens' states in rank space with their x."""
    block, width = rank_block(max_rank)
    num_features = x.shape[1]
    sizes = [rank * num_features for _, _, rank, _ in segments]
    grads = torch.empty(sum(sizes), dtype=torch.float32, device=x.device)
    offsets = torch.tensor([sum(sizes[:i]) for i in range(len(sizes))], dtype=torch.int64, device=x.device)
    rows = torch.tensor(segments, dtype=torch.int64, device=x.device).view(-1, 4)

    def grid(meta: dict[str, int]) -> tuple[int, int, int]:
        return len(segments), triton.cdiv(num_features, meta["BLOCK_FEATURES"]), width // block

    if segments:
        with LAUNCHING:
            outer_kernel[grid](
                hidden, x, rows, offsets, grads, num_features, width, BLOCK_TOKENS=32, BLOCK_RANK=block
            )  # fmt: skip
    ranks = [rank for _, _, rank, _ in segments]
    parts = grads.split(sizes)
    return [part.view(rank, num_features) for part, rank in zip(parts, ranks, strict=True)]
