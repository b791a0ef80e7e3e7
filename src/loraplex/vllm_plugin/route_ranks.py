"""The operator that gates a mixture's experts by their own values in rank space, inside vLLM.

A rank column is a row of A: an expert's, or one that a linear router appended, whose value is a logit. What the columns
of a token count for is in static buffers, as in gates.py. Mirrors loraplex/routers/router.py and kernels/csrc/router.h.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("loraplex", "FRAGMENT")
_SCHEMA = "route_ranks_(Tensor(a!) x, Tensor? whole, Tensor slots, Tensor[] tables, int first_module) -> ()"

NONE, ARROW, SPECTR, SOFTMAX, SIGMOID = range(5)  # what makes a gate column's gates; NONE: 1
TEMPERATURE, TOP_K, TOP_P, WEIGHT = range(4)  # rows of `settings`
ALL = math.inf  # a top_k or top_p that keeps all experts


def route_ranks_(
    x: Tensor,  # [slices, tokens, rank]  changed in place
    whole: Tensor | None,  # its sum over the ranks of a layer whose input is sharded; None: x
    slots: Tensor,  # [most tokens]  int64
    tables: Sequence[Tensor],  # RouterBuffers.tables
    first_module: int,  # the module of x[0]; the slices follow
) -> None:
    """Multiply each expert's rank columns by the gate that the token's own values in rank space say.

    There is no branch on the tables' contents, so a graph that was captured without such mixtures is right with them.
    """
    coefficients, offsets, *of_tokens = tables
    num_slices, num_tokens, _ = x.shape
    score_columns, gate_columns, squares, kinds, same, settings = (table[:num_tokens] for table in of_tokens)
    modules, tokens = slice(first_module, first_module + num_slices), slots[:num_tokens]
    read = x if whole is None else whole
    shares = read * torch.addcmul(coefficients[modules].index_select(1, tokens), squares, read)
    sums = offsets.new_zeros(num_slices, num_tokens, offsets.shape[-1])
    sums.scatter_add_(2, score_columns.expand(num_slices, -1, -1), shares)
    size = sums.abs()
    scores = torch.where(kinds == ARROW, size, torch.where(kinds == SPECTR, size.sqrt(), sums))
    scores += offsets[modules].index_select(1, tokens)
    gates = choose(scores, kinds, same, settings)
    x.mul_(gates.gather(2, gate_columns.expand(num_slices, -1, -1)))


def choose(
    scores: Tensor,  # [slices, tokens, columns]
    kinds: Tensor,  # [tokens, columns]  int64
    same: Tensor,  # [tokens, columns, columns]  float32: 1 for two columns of one mixture
    settings: Tensor,  # [tokens, 4, columns]  float32
) -> Tensor:
    """Gates from scores, [slices, tokens, columns]; 1 in columns of no mixture."""
    temperature, top_k, top_p, weight = settings.unbind(1)
    own, other = scores.unsqueeze(-1), scores.unsqueeze(-2)
    earlier = torch.ones_like(same[0]).tril(-1)  # of two equal scores the first comes first
    before = torch.where(own == other, earlier, (other > own).to(scores.dtype)) * same
    is_kept = before.sum(-1) < top_k
    largest = other.masked_fill(same == 0, -math.inf).amax(-1)
    shares = torch.where(is_kept & (kinds != NONE), torch.exp((scores - largest) / temperature), 0.0)
    others = shares.unsqueeze(-2)
    is_enough = (before * others).sum(-1) >= top_p * (same * others).sum(-1)  # without it: the largest that add up
    shares = shares.masked_fill(is_enough, 0.0)
    softmax = shares / (same * shares.unsqueeze(-2)).sum(-1)
    sigmoid = torch.sigmoid(scores / temperature) * is_kept
    gates = torch.where(kinds == SIGMOID, sigmoid, softmax) * weight
    return torch.where(kinds == NONE, 1.0, gates)


def _fake(x: Tensor, whole: Tensor | None, slots: Tensor, tables: Sequence[Tensor], first_module: int) -> None:
    return None


_LIBRARY.define(_SCHEMA)
_LIBRARY.impl("route_ranks_", route_ranks_, "CompositeExplicitAutograd")
torch.library.register_fake("loraplex::route_ranks_", _fake, lib=_LIBRARY)
