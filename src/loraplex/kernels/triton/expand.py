"""Out of rank space: what a tile's tokens are in rank space times the factors of their slots, added to the output."""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from loraplex.kernels.triton.product import add_product
from loraplex.kernels.triton.shrink import MAX_PROJECTIONS, factor_of, pick, rank_block
from loraplex.kernels.triton.tuning import LAUNCHING, tuned
from loraplex.kernels.triton.work import WorkList


@triton.jit
def add_entries(
    total,  # [BLOCK_TOKENS, BLOCK_OUT]  float32
    width_sum,
    like,
    table,
    hidden,
    entries,
    first_entry,
    num_entries,
    num_tokens,
    module,
    projection,
    num_modules,
    num_rows,
    num_out,
    width,
    outs,
    is_out,
    FACTOR: tl.constexpr,
    ALIGNED: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    NUM_PROJECTIONS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
):
    """total + the tile's entries for one projection; and the sum of their ranks."""
    tokens = tl.arange(0, BLOCK_TOKENS)
    is_token = tokens < num_tokens
    for number in range(first_entry, first_entry + num_entries):
        entry = entries + number * 4
        cell = tl.load(entry + 2).to(tl.int64) * num_modules + module
        rank = tl.load(table + cell * 3 + 2).to(tl.int32)
        width_sum += rank
        factor = factor_of(tl.load(table + cell * 3 + FACTOR), like, ALIGNED)
        rows = tl.load(entry + 3).to(tl.int64) + tokens
        for first_rank in range(0, rank, BLOCK_RANK):
            ranks = first_rank + tl.arange(0, BLOCK_RANK)
            states = tl.zeros((BLOCK_TOKENS, BLOCK_RANK), dtype=tl.float32)
            for part in range(NUM_PARTS):
                at = ((part * NUM_PROJECTIONS + projection).to(tl.int64) * num_rows + rows) * width
                states += tl.load(hidden + at[:, None] + ranks[None, :], mask=is_token[:, None], other=0.0)
            weights = tl.load(
                factor + ranks.to(tl.int64)[:, None] * num_out + outs[None, :],
                mask=(ranks < rank)[:, None] & is_out[None, :],
                other=0.0,
            )
            total = add_product(total, states.to(weights.dtype), weights)
    return total, width_sum


@tuned(
    "BLOCK_OUT",
    (64, 128, 256),
    key=("out0", "BLOCK_RANK", "BLOCK_TOKENS", "NUM_PROJECTIONS", "NUM_PARTS"),
    changes=("y0", "y1", "y2"),
)
@triton.jit(do_not_specialize=["module0", "module1", "module2", "num_modules", "num_rows", "out0", "out1", "out2"])
def expand_kernel(
    y0,  # [tokens, out]  changed in place; y1 and y2 likewise, of the other projections
    y1,
    y2,
    like,  # of the factors' dtype
    table,  # [slots, modules, 3]  int64
    hidden,  # [parts, projections, rows, width]  float32
    tiles,  # [tiles, 4]  int32
    entries,  # [entries, 4]  int32
    module0,
    module1,
    module2,
    out0,
    out1,
    out2,
    num_modules,
    num_rows,
    width,
    FACTOR: tl.constexpr,
    SUMMED: tl.constexpr,  # all projections go into y0, as the gradient of their common x does
    ALIGNED: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    NUM_PROJECTIONS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """y_p[t, o] += sum over the tile's entries and their ranks r of hidden[p, row, r] * factor_p[r, o]."""
    tile = tiles + tl.program_id(0).to(tl.int64) * 4
    num_tokens = tl.load(tile + 1)
    if num_tokens == 0:
        return
    projection = tl.program_id(2)
    num_out = pick(projection, out0, out1, out2, 1 if SUMMED else NUM_PROJECTIONS)
    if tl.program_id(1) * BLOCK_OUT >= num_out:
        return
    if ALIGNED:
        num_out = num_out // 16 * 16  # the same, and the compiler sees that rows begin at multiples of 16
    outs = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    is_out = outs < num_out
    first_entry, num_entries = tl.load(tile + 2), tl.load(tile + 3)
    total = tl.zeros((BLOCK_TOKENS, BLOCK_OUT), dtype=tl.float32)
    width_sum = 0
    if SUMMED:
        for number in tl.static_range(NUM_PROJECTIONS):
            module = pick(number, module0, module1, module2, NUM_PROJECTIONS)
            total, width_sum = add_entries(
                total, width_sum, like, table, hidden, entries, first_entry, num_entries, num_tokens,
                module, projection + number, num_modules, num_rows, num_out, width, outs, is_out,
                FACTOR, ALIGNED, NUM_PARTS, NUM_PROJECTIONS, BLOCK_TOKENS, BLOCK_RANK,
            )  # fmt: skip
    else:
        module = pick(projection, module0, module1, module2, NUM_PROJECTIONS)
        total, width_sum = add_entries(
            total, width_sum, like, table, hidden, entries, first_entry, num_entries, num_tokens,
            module, projection, num_modules, num_rows, num_out, width, outs, is_out,
            FACTOR, ALIGNED, NUM_PARTS, NUM_PROJECTIONS, BLOCK_TOKENS, BLOCK_RANK,
        )  # fmt: skip
    tokens = tl.arange(0, BLOCK_TOKENS)
    y = y0
    if NUM_PROJECTIONS > 1 and not SUMMED:
        if projection == 1:
            y = y1
        if NUM_PROJECTIONS > 2 and projection == 2:
            y = y2
    places = (tl.load(tile).to(tl.int64) + tokens)[:, None] * num_out + outs[None, :]
    # Where no adapter has a share, y keeps its bits: y + 0 would turn -0 into 0.
    is_changed = ((tokens < num_tokens) & (width_sum > 0))[:, None] & is_out[None, :]
    former = tl.load(y + places, mask=is_changed, other=0.0)
    tl.store(y + places, (former.to(tl.float32) + total).to(former.dtype), mask=is_changed)


def expand(
    ys: Sequence[Tensor],  # [tokens, out] each, contiguous, of the factors' dtype or float32; changed in place
    hidden: Tensor,  # [parts, projections, rows, width]
    table: Tensor,
    modules: Sequence[int],
    work: WorkList,
    max_rank: int,
    *,
    column: int = 1,  # of the table: 1 is lora_b, 0 is lora_a
    aligned: bool = False,
    like: Tensor | None = None,  # of the factors' dtype; None: the ys are
) -> None:
    """Add to every projection's output; with one output and several projections, to that one their sum."""
    if not len(work.tiles):
        return
    block, width = rank_block(max_rank)
    summed = len(ys) < len(modules)
    y0, y1, y2 = (ys[min(i, len(ys) - 1)] for i in range(MAX_PROJECTIONS))
    m0, m1, m2 = (modules[min(i, len(modules) - 1)] for i in range(MAX_PROJECTIONS))
    outs = [y.shape[1] for y in (y0, y1, y2)]

    def grid(meta: dict[str, int]) -> tuple[int, int, int]:
        return len(work.tiles), triton.cdiv(max(outs), meta["BLOCK_OUT"]), len(ys)

    with LAUNCHING:
        expand_kernel[grid](
            y0, y1, y2, y0 if like is None else like, table, hidden, work.tiles, work.entries, m0, m1, m2, *outs,
            table.shape[1], hidden.shape[2], width,
            FACTOR=column, SUMMED=summed, ALIGNED=aligned and all(out % 16 == 0 for out in outs),
            NUM_PARTS=hidden.shape[0], NUM_PROJECTIONS=len(modules),
            BLOCK_TOKENS=work.block_tokens, BLOCK_RANK=block,
        )  # fmt: skip
