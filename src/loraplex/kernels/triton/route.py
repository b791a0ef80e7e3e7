"""Between shrink and expand: the gates that mixtures' routers predict, each token's from its own values.

The same as kernels/csrc/router.h: `shrink` has left scaling * lora_a x of each expert, and one launch multiplies it by
the expert's gate, for all mixtures and all projections that share x.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from loraplex.kernels.triton.product import add_product
from loraplex.kernels.triton.shrink import MAX_PROJECTIONS, pick, rank_block
from loraplex.kernels.triton.tuning import LAUNCHING
from loraplex.kernels.triton.work import RouteWork

# RouterKind in router.h
_ARROW, _SPECTR, _SIGMOID, _STATIC = tl.constexpr(0), tl.constexpr(1), tl.constexpr(3), tl.constexpr(4)
_BLOCK_IN = 128


@triton.jit
def states_of(
    hidden, rows, ranks, rank, is_token, projection, num_rows, width,
    NUM_PARTS: tl.constexpr, NUM_PROJECTIONS: tl.constexpr,
):  # fmt: skip
    """Some values in rank space of a tile's tokens, [BLOCK_TOKENS, BLOCK_RANK]."""
    states = tl.zeros((rows.shape[0], ranks.shape[0]), dtype=tl.float32)
    is_there = is_token[:, None] & (ranks < rank)[None, :]
    for part in range(NUM_PARTS):
        at = ((part * NUM_PROJECTIONS + projection).to(tl.int64) * num_rows + rows) * width
        states += tl.load(hidden + at[:, None] + ranks[None, :], mask=is_there, other=0.0)
    return states


@triton.jit
def arrow_score(
    values,  # [rank]
    hidden, rows, rank, is_token, projection, num_rows, width,
    NUM_PARTS: tl.constexpr, NUM_PROJECTIONS: tl.constexpr, BLOCK_RANK: tl.constexpr,
):  # fmt: skip
    """|c . h| of each token."""
    score = tl.zeros(rows.shape, dtype=tl.float32)
    for first in range(0, rank, BLOCK_RANK):
        ranks = first + tl.arange(0, BLOCK_RANK)
        c = tl.load(values + ranks, mask=ranks < rank, other=0.0)
        h = states_of(hidden, rows, ranks, rank, is_token, projection, num_rows, width, NUM_PARTS, NUM_PROJECTIONS)
        score += tl.sum(h * c[None, :], axis=1)
    return tl.abs(score)


@triton.jit
def spectr_score(
    values,  # [rank, rank]
    hidden, rows, rank, is_token, projection, num_rows, width,
    NUM_PARTS: tl.constexpr, NUM_PROJECTIONS: tl.constexpr, BLOCK_RANK: tl.constexpr,
):  # fmt: skip
    """sqrt(h' G h) of each token."""
    score = tl.zeros(rows.shape, dtype=tl.float32)
    for first in range(0, rank, BLOCK_RANK):
        ranks = first + tl.arange(0, BLOCK_RANK)
        product = tl.zeros((rows.shape[0], BLOCK_RANK), dtype=tl.float32)
        for second in range(0, rank, BLOCK_RANK):
            others = second + tl.arange(0, BLOCK_RANK)
            places = others.to(tl.int64)[:, None] * rank + ranks[None, :]
            gram = tl.load(values + places, mask=(others < rank)[:, None] & (ranks < rank)[None, :], other=0.0)
            h = states_of(hidden, rows, others, rank, is_token, projection, num_rows, width, NUM_PARTS, NUM_PROJECTIONS)
            product = add_product(product, h, gram)
        h = states_of(hidden, rows, ranks, rank, is_token, projection, num_rows, width, NUM_PARTS, NUM_PROJECTIONS)
        score += tl.sum(product * h, axis=1)
    return tl.sqrt(tl.maximum(score, 0.0))


@triton.jit
def linear_score(
    values,  # [in + 1]
    x_rows,  # [BLOCK_TOKENS]  where the tokens' inputs begin
    is_token,
    num_in,
    BLOCK_IN: tl.constexpr,
):
    """r . x + bias of each token."""
    score = tl.zeros(is_token.shape, dtype=tl.float32)
    for first in range(0, num_in, BLOCK_IN):
        features = first + tl.arange(0, BLOCK_IN)
        is_feature = features < num_in
        r = tl.load(values + features, mask=is_feature, other=0.0)
        x = tl.load(x_rows[:, None] + features[None, :], mask=is_token[:, None] & is_feature[None, :], other=0.0)
        score += tl.sum(x.to(tl.float32) * r[None, :], axis=1)
    return score + tl.load(values + num_in)


@triton.jit
def position_of(scores, e, columns):
    """Whether the e-th expert comes before each of the others: by its score, and of equal ones the first."""
    score = tl.sum(tl.where(columns[None, :] == e, scores, 0.0), axis=1)[:, None]
    return (score > scores) | ((score == scores) & (e < columns)[None, :])


@triton.jit
def choose(scores, columns, num_experts, kind, top_k, temperature, top_p):
    """Gates from scores, both [BLOCK_TOKENS, BLOCK_EXPERTS]; the score -inf is that of no expert."""
    position = tl.zeros(scores.shape, dtype=tl.int32)
    for e in range(num_experts):
        position += position_of(scores, e, columns).to(tl.int32)
    kept = (position < tl.where(top_k == 0, num_experts, top_k)) & (scores > float("-inf"))
    if kind == _STATIC:
        gates = tl.where(kept, scores, 0.0)
    elif kind == _SIGMOID:
        gates = tl.where(kept, 1.0 / (1.0 + tl.exp(-scores / temperature)), 0.0)
    else:
        most = tl.max(tl.where(kept, scores, float("-inf")), axis=1)[:, None]
        gates = tl.where(kept, tl.exp((scores - most) / temperature), 0.0)
        total = tl.sum(gates, axis=1)[:, None]
        if top_p > 0:  # the largest, until they add up to it
            before = tl.zeros(scores.shape, dtype=tl.float32)
            for e in range(num_experts):
                gate = tl.sum(tl.where(columns[None, :] == e, gates, 0.0), axis=1)[:, None]
                before += tl.where(position_of(scores, e, columns), gate, 0.0)
            gates = tl.where(before < top_p * total, gates, 0.0)
            total = tl.sum(gates, axis=1)[:, None]
        gates = gates / total
    return gates


@triton.jit(do_not_specialize=["module0", "module1", "module2", "num_modules", "num_rows", "num_kept"])
def route_kernel(
    x,  # [tokens, in]
    table,  # [slots, modules, 3]  int64
    hidden,  # [parts, projections, rows, width]  float32, changed in place
    tiles,  # [tiles, 4]  int32
    experts,  # [experts, 4]  int32
    settings,  # [experts, 3]  float32
    parameters,  # [experts, modules]  int64
    told,  # [experts, 2]  int64
    kept,  # [modules, num_kept]  float32, written
    num_kept,
    module0,
    module1,
    module2,
    num_modules,
    num_rows,
    num_in,
    width,
    KEEPS: tl.constexpr,  # whether some gates are kept
    NUM_PARTS: tl.constexpr,
    NUM_PROJECTIONS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """hidden[.., row, r] *= the gate of the row's expert for its token."""
    tile = tiles + tl.program_id(0).to(tl.int64) * 4
    projection = tl.program_id(1)
    module = pick(projection, module0, module1, module2, NUM_PROJECTIONS)
    first_token, num_tokens = tl.load(tile).to(tl.int64), tl.load(tile + 1)
    first_expert, num_experts = tl.load(tile + 2).to(tl.int64), tl.load(tile + 3)
    tokens = tl.arange(0, BLOCK_TOKENS)
    columns = tl.arange(0, BLOCK_EXPERTS)
    is_token = tokens < num_tokens
    kind = tl.load(experts + first_expert * 4 + 2)
    scores = tl.full((BLOCK_TOKENS, BLOCK_EXPERTS), float("-inf"), dtype=tl.float32)
    for e in range(num_experts):
        expert = experts + (first_expert + e) * 4
        address = tl.load(parameters + (first_expert + e) * num_modules + module)
        if address != 0:
            values = address.to(tl.pointer_type(tl.float32))
            rank = tl.load(table + (tl.load(expert).to(tl.int64) * num_modules + module) * 3 + 2).to(tl.int32)
            rows = tl.load(expert + 1).to(tl.int64) + first_token + tokens
            if kind == _ARROW:
                score = arrow_score(
                    values, hidden, rows, rank, is_token, projection, num_rows, width,
                    NUM_PARTS, NUM_PROJECTIONS, BLOCK_RANK,
                )  # fmt: skip
            elif kind == _SPECTR:
                score = spectr_score(
                    values, hidden, rows, rank, is_token, projection, num_rows, width,
                    NUM_PARTS, NUM_PROJECTIONS, BLOCK_RANK,
                )  # fmt: skip
            elif kind == _STATIC:
                score = tl.zeros((BLOCK_TOKENS,), dtype=tl.float32) + tl.load(values)
            else:
                score = linear_score(values, x + (first_token + tokens) * num_in, is_token, num_in, BLOCK_IN)
            scores = tl.where(columns[None, :] == e, score[:, None], scores)
    of_first = settings + first_expert * 3
    temperature, top_p = tl.load(of_first), tl.load(of_first + 1)
    top_k = tl.load(experts + first_expert * 4 + 3)
    gates = choose(scores, columns, num_experts, kind, top_k, temperature, top_p)
    weight = tl.load(of_first + 2)
    tl.debug_barrier()  # all values are read before the first is changed
    for e in range(num_experts):
        expert = experts + (first_expert + e) * 4
        if tl.load(parameters + (first_expert + e) * num_modules + module) != 0:
            gate = tl.sum(tl.where(columns[None, :] == e, gates, 0.0), axis=1)
            if KEEPS:
                place, step = tl.load(told + (first_expert + e) * 2), tl.load(told + (first_expert + e) * 2 + 1)
                kept_at = kept + module.to(tl.int64) * num_kept + place + (first_token + tokens) * step
                tl.store(kept_at, gate, mask=is_token & (step > 0))
            gate *= weight
            rank = tl.load(table + (tl.load(expert).to(tl.int64) * num_modules + module) * 3 + 2).to(tl.int32)
            rows = tl.load(expert + 1).to(tl.int64) + first_token + tokens
            for part in range(NUM_PARTS):
                at = ((part * NUM_PROJECTIONS + projection).to(tl.int64) * num_rows + rows) * width
                for first in range(0, rank, BLOCK_RANK):
                    ranks = first + tl.arange(0, BLOCK_RANK)
                    places, is_there = at[:, None] + ranks[None, :], is_token[:, None] & (ranks < rank)[None, :]
                    h = tl.load(hidden + places, mask=is_there, other=0.0)
                    tl.store(hidden + places, tl.where(gate[:, None] == 0, 0.0, h * gate[:, None]), mask=is_there)


def route(
    x: Tensor,  # [tokens, in]  contiguous
    hidden: Tensor,  # [parts, projections, rows, width]  float32, changed in place
    table: Tensor,
    modules: Sequence[int],  # one of each projection
    work: RouteWork,
    max_rank: int,
    block_tokens: int,
) -> None:
    """Multiply what `shrink` left of each expert by its gate."""
    block, width = rank_block(max_rank)
    m0, m1, m2 = (modules[min(i, len(modules) - 1)] for i in range(MAX_PROJECTIONS))
    with LAUNCHING:
        route_kernel[(len(work.tiles), len(modules))](
            x, table, hidden, work.tiles, work.experts, work.settings, work.parameters,
            work.told, work.settings if work.kept is None else work.kept,
            0 if work.kept is None else work.kept.shape[1], m0, m1, m2,
            table.shape[1], hidden.shape[2], x.shape[1], width,
            KEEPS=work.kept is not None, NUM_PARTS=hidden.shape[0], NUM_PROJECTIONS=len(modules),
            BLOCK_TOKENS=block_tokens, BLOCK_RANK=block,
            BLOCK_EXPERTS=max(2, triton.next_power_of_2(work.max_experts)), BLOCK_IN=_BLOCK_IN,
        )  # fmt: skip
