"""Into rank space: every entry's tokens times its slot's factor, times the tokens' gates."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from loraplex.kernels.triton.product import add_product
from loraplex.kernels.triton.tuning import LAUNCHING, tuned
from loraplex.kernels.triton.work import SMALL_TILE_TOKENS, WorkList

MAX_PROJECTIONS = 3  # of one launch
_LARGEST_RANK_BLOCK = 64
# Decoding has few tiles: their features are cut into parts of at least _PART, and at most _MAX_PARTS of them.
_PART = 512
_MAX_PARTS = 16


@triton.jit
def pick(number, first, second, third, COUNT: tl.constexpr):
    """The number-th of up to three values."""
    chosen = first
    if COUNT > 1:
        chosen = tl.where(number == 1, second, chosen)
    if COUNT > 2:
        chosen = tl.where(number == 2, third, chosen)
    return chosen


@triton.jit
def factor_of(address, like, ALIGNED: tl.constexpr):
    """The factor that lies at an address, as elements of `like`."""
    factor = address.to(tl.pointer_type(like.dtype.element_ty))
    if ALIGNED:
        factor = tl.multiple_of(factor, 16)
    return factor


@tuned("BLOCK_IN", (64, 128, 256), key=("num_in", "BLOCK_RANK", "BLOCK_TOKENS", "NUM_PROJECTIONS"))
@triton.jit(do_not_specialize=["module0", "module1", "module2", "num_modules", "num_rows", "gate_stride"])
def shrink_kernel(
    x,  # [tokens, in]
    table,  # [slots, modules, 3]  int64: addresses of lora_a and lora_b, rank
    scalings,  # [slots, modules]  float32
    gates,  # float32: [rows], [modules, rows] or [projections, rows, width]
    entries,  # [entries, 4]  int32
    hidden,  # [parts, projections, rows, width]  float32, written
    module0,
    module1,
    module2,
    num_modules,
    num_rows,
    gate_stride,  # between modules' or projections' gates
    num_in,
    part_size,  # features of a part, a multiple of every BLOCK_IN
    width,
    FACTOR: tl.constexpr,  # 0 is lora_a, 1 is lora_b
    GATES: tl.constexpr,  # 0 is none, 1 is one a row, 2 is one a rank of a row
    ALIGNED: tl.constexpr,
    NUM_PROJECTIONS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """hidden[part, p, row, r] = gate[row] * scaling * sum of x[t, i] * factor[r, i] over the part's features i."""
    entry = entries + tl.program_id(0).to(tl.int64) * 4
    part = tl.program_id(1)
    projection = tl.program_id(2) % NUM_PROJECTIONS
    first_rank = tl.program_id(2) // NUM_PROJECTIONS * BLOCK_RANK
    num_tokens = tl.load(entry + 1)
    if num_tokens == 0:
        return
    module = pick(projection, module0, module1, module2, NUM_PROJECTIONS)
    cell = tl.load(entry + 2).to(tl.int64) * num_modules + module
    rank = tl.load(table + cell * 3 + 2).to(tl.int32)
    if first_rank >= rank:
        return
    factor = factor_of(tl.load(table + cell * 3 + FACTOR), x, ALIGNED)
    tokens = tl.arange(0, BLOCK_TOKENS)
    ranks = first_rank + tl.arange(0, BLOCK_RANK)
    is_token, is_rank = tokens < num_tokens, ranks < rank
    x_rows = x + (tl.load(entry).to(tl.int64) + tokens) * num_in
    factor_rows = factor + ranks.to(tl.int64) * num_in
    total = tl.zeros((BLOCK_TOKENS, BLOCK_RANK), dtype=tl.float32)
    for first in range(part * part_size, tl.minimum((part + 1) * part_size, num_in), BLOCK_IN):
        features = first + tl.arange(0, BLOCK_IN)
        is_feature = features < num_in
        x_part = tl.load(x_rows[:, None] + features[None, :], mask=is_token[:, None] & is_feature[None, :], other=0.0)
        weights = tl.load(
            factor_rows[:, None] + features[None, :], mask=is_rank[:, None] & is_feature[None, :], other=0.0
        )
        total = add_product(total, x_part, tl.trans(weights))
    rows = tl.load(entry + 3).to(tl.int64) + tokens
    if GATES == 1:
        gate = tl.load(gates + module * gate_stride.to(tl.int64) + rows, mask=is_token, other=0.0)
        total *= gate[:, None] * tl.load(scalings + cell)
    if GATES == 2:
        places = projection * gate_stride.to(tl.int64) + rows[:, None] * width + ranks[None, :]
        total *= tl.load(gates + places, mask=is_token[:, None] & is_rank[None, :], other=0.0) * tl.load(
            scalings + cell
        )
    out = ((part * NUM_PROJECTIONS + projection).to(tl.int64) * num_rows + rows) * width
    tl.store(hidden + out[:, None] + ranks[None, :], total, mask=is_token[:, None])


def rank_block(max_rank: int) -> tuple[int, int]:
    """The rank rows that a program computes, and the width of a row in rank space: a multiple of them."""
    block = min(max(16, triton.next_power_of_2(max_rank)), _LARGEST_RANK_BLOCK)
    return block, -(-max(max_rank, 1) // block) * block


def num_parts(num_in: int, block_tokens: int) -> int:
    """Into how many parts the features are cut; by the layout alone, so that a row's bits don't depend on others."""
    return 1 if block_tokens > SMALL_TILE_TOKENS else max(1, min(_MAX_PARTS, num_in // _PART))


def shrink(
    x: Tensor,  # [tokens, in]  contiguous
    table: Tensor,
    scalings: Tensor,
    modules: Sequence[int],  # one of each projection that shares x
    work: WorkList,
    gates: Tensor | None,  # float32: [rows], [modules, rows], or with `rank_gates` [projections, rows, width]
    max_rank: int,
    *,
    column: int = 0,  # of the table: 0 is lora_a, 1 is lora_b
    rank_gates: bool = False,
    aligned: bool = False,  # all factors begin at, and all their rows are, multiples of 16
    hidden: Tensor | None = None,
) -> Tensor:  # [parts, projections, rows, width]  float32
    """Every entry's tokens in rank space, in parts that `expand` sums up."""
    block, width = rank_block(max_rank)
    num_in, parts = x.shape[1], num_parts(x.shape[1], work.block_tokens)
    if hidden is None:
        hidden = torch.empty(parts, len(modules), work.num_rows, width, dtype=torch.float32, device=x.device)
    if not len(work.entries):
        return hidden
    m0, m1, m2 = (modules[min(i, len(modules) - 1)] for i in range(MAX_PROJECTIONS))
    kind = 0 if gates is None else 2 if rank_gates else 1
    stride = 0 if gates is None or gates.ndim == 1 or gates.shape[0] == 1 else gates.stride(0)
    part_size = -(-num_in // (parts * 256)) * 256
    grid = (len(work.entries), parts, len(modules) * (width // block))
    with LAUNCHING:
        shrink_kernel[grid](
            x, table, scalings, scalings if gates is None else gates, work.entries, hidden,
            m0, m1, m2, table.shape[1], work.num_rows, stride, num_in, part_size, width,
            FACTOR=column, GATES=kind, ALIGNED=aligned and num_in % 16 == 0, NUM_PROJECTIONS=len(modules),
            BLOCK_TOKENS=work.block_tokens, BLOCK_RANK=block,
        )  # fmt: skip
    return hidden
