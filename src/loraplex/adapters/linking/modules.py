"""One module's factors made of those of several adapters (PEFT 0.21, tuners/lora/model.py, `add_weighted_adapter`)."""

import math
from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from loraplex.adapters.linking.combination import Combination
from loraplex.adapters.linking.task_arithmetic import combine
from loraplex.adapters.weights import LoraWeights
from loraplex.errors import ConfigError, TooLargeError

MAX_UPDATE_VALUES = 1 << 31  # of all adapters' updates of a module that are formed: 8 GiB in float32

Weighted = Sequence[tuple[float, LoraWeights]]  # the adapters that have the module, with their weights


def combine_module(
    path: str, members: Weighted, combination: Combination, max_rank: int, generator: Generator
) -> LoraWeights:
    """The module's factors, of LoRA scaling 1, in float32; `max_rank` is that of an svd.

    Raises ConfigError (different ranks, for a method that adds factors) and TooLargeError (an update too large to be
    formed).
    """
    if combination.method == "cat":
        lora_a, lora_b = _concatenate(members)
    elif combination.method == "svd":
        lora_a, lora_b = _truncate_factors(*_concatenate(members), max_rank)
    elif combination.has_svd:
        lora_a, lora_b = _truncate_update(path, members, combination, max_rank, generator)
    else:
        lora_a, lora_b = _add_factors(path, members, combination, generator)
    kind = members[0][1].kind
    return LoraWeights(kind=kind, lora_a=lora_a.float().contiguous(), lora_b=lora_b.float().contiguous(), scaling=1.0)


def _concatenate(members: Weighted) -> tuple[Tensor, Tensor]:  # [ranks, in], [ranks, out]
    """The factors side by side, weight and LoRA scaling folded into A. In float64, so that A is rounded once."""
    lora_a = torch.cat([weights.lora_a.double() * (weight * weights.scaling) for weight, weights in members])
    return lora_a, torch.cat([weights.lora_b.double() for _, weights in members])


def _truncate_factors(lora_a: Tensor, lora_b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The closest factors of `rank` to B A, from an SVD of the small matrix between the bases of both factors.

    B = Q R and A^T = P S (QR decompositions), so B A = Q (R S^T) P^T, and R S^T is [ranks, ranks].
    """
    q, r = torch.linalg.qr(lora_b.t())
    p, s = torch.linalg.qr(lora_a.t())
    u, values, vh = torch.linalg.svd(r @ s.t(), full_matrices=False)
    return vh[:rank] @ p.t(), (q @ (u[:, :rank] * values[:rank])).t()


def _truncate_update(
    path: str, members: Weighted, combination: Combination, rank: int, generator: Generator
) -> tuple[Tensor, Tensor]:
    """The closest factors of `rank` to the combined updates, which are formed and whose values may be left out."""
    shape = members[0][1].shape
    if len(members) * shape.in_features * shape.out_features > MAX_UPDATE_VALUES:
        raise TooLargeError(
            f"combination {combination.method!r} forms {len(members)} updates of {path!r}, {shape.in_features} -> "
            f"{shape.out_features}, which have more than {MAX_UPDATE_VALUES} values. Use 'svd', which doesn't."
        )
    is_embedding = shape.kind == "embedding"  # whose update PEFT has the other way round
    updates = [_update(weights) for _, weights in members]
    updates = [update.t() if is_embedding else update for update in updates]
    update = combine(updates, [weight for weight, _ in members], combination, generator)
    u, values, vh = torch.linalg.svd(update.t() if is_embedding else update, full_matrices=False)
    return vh[:rank], (u[:, :rank] * values[:rank]).t()


def _update(weights: LoraWeights) -> Tensor:  # [out, in]
    return (weights.lora_b.float().t() @ weights.lora_a.float()) * weights.scaling


def _add_factors(path: str, members: Weighted, combination: Combination, generator: Generator) -> tuple[Tensor, Tensor]:
    """A and B combined each by itself, with the root of weight * scaling; its sign goes to A."""
    ranks = [weights.rank for _, weights in members]
    if len(set(ranks)) > 1:
        raise ConfigError(
            f"combination {combination.method!r} adds factors of one rank, but {path!r} has the ranks {ranks} in the "
            "adapters of the link. Use 'cat', or a combination with svd."
        )
    totals = [weight * weights.scaling for weight, weights in members]
    roots = [math.sqrt(abs(total)) for total in totals]
    signed = [math.copysign(root, total) for root, total in zip(roots, totals, strict=True)]
    lora_a = combine([weights.lora_a.float() for _, weights in members], signed, combination, generator)
    # B as PEFT has it, [out, rank]: the same seed leaves out the same values.
    lora_b = combine([weights.lora_b.float().t() for _, weights in members], roots, combination, generator)
    return lora_a, lora_b.t()
