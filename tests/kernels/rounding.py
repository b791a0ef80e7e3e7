"""How far from float64 a kernel may be: as far as rounding takes it, told by the sizes of what it adds up.

Terms may cancel, so an error is not measured against the result, but against the sum of the terms' absolute values.
On any processor, in any order, such a sum is off by a few roundings of it: those of a chain of n additions are at most
n, and they are of either sign, so that long chains come to few as well.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from loraplex.kernels.segments import LoraSegment

_NUM_EPS = 4  # eight roundings of the whole sum


class Sizes(NamedTuple):
    """Of every value of a result, in float64."""

    terms: Tensor  # the sum of its terms' absolute values
    kept: Tensor  # the same, with the absolute values of the sums that may be kept in the result's own dtype


def excess(result: Tensor, expected: Tensor, sizes: Sizes) -> float:
    """The largest error, in parts of what rounding explains: more than 1 is a fault."""
    if not result.numel():
        return 0.0
    bound = torch.finfo(torch.promote_types(result.dtype, torch.float32)).eps * sizes.terms
    if result.dtype.itemsize < 4:
        bound = bound + torch.finfo(result.dtype).eps * sizes.kept
    error = (result.double() - expected).abs()
    return float((error / (_NUM_EPS * bound).clamp(min=1e-300)).detach().max())


def worst_excess(results: Sequence[Tensor], expected: Sequence[Tensor], sizes: Sequence[Sizes]) -> float:
    return max([0.0, *(excess(*of_one) for of_one in zip(results, expected, sizes, strict=True))])


def doubled(segments: Sequence[LoraSegment]) -> list[LoraSegment]:
    """The segments in float64, each gate a column or a row of its rank rows."""
    made = []
    for s in segments:
        gates = torch.as_tensor(s.gates, dtype=torch.float64, device=s.lora_a.device)
        gates = gates if gates.ndim == 2 else gates.expand(s.stop - s.start).unsqueeze(1)
        made.append(s._replace(lora_a=s.lora_a.double(), lora_b=s.lora_b.double(), gates=gates))
    return made


def output_sizes(y: Tensor, x: Tensor, segments: Sequence[LoraSegment]) -> Sizes:
    """Of y + sum of gates * (x lora_a^T) lora_b."""
    terms, kept, x = y.double().abs(), y.double().abs(), x.double()
    for s in doubled(segments):
        part = x[s.start : s.stop]
        terms[s.start : s.stop] += (s.gates.abs() * (part.abs() @ s.lora_a.abs().t())) @ s.lora_b.abs()
        kept[s.start : s.stop] += (s.gates * (part @ s.lora_a.t())).abs() @ s.lora_b.abs()
    return Sizes(terms, kept)


def gradient_sizes(
    ys: Sequence[Tensor],  # of each projection
    x: Tensor,
    segments: Sequence[Sequence[LoraSegment]],  # of each projection
    grads: Sequence[Tensor],  # of the outputs
    leaves: Sequence[Tensor],  # float64: what the arguments before are made of; no factor is 0
) -> list[Sizes]:
    """Of the leaves' gradients: what autograd sums up for them, with absolute values."""
    found = []
    for signed in (False, True):
        loss = torch.stack([(grad.abs() * y).sum() for grad, y in zip(grads, ys, strict=True)]).sum()
        for grad, of_one in zip(grads, segments, strict=True):
            for s in doubled(of_one):
                loss = loss + _size_of_segment(x[s.start : s.stop], grad[s.start : s.stop], s, signed)
        found.append([gradient.abs() for gradient in torch.autograd.grad(loss, list(leaves), retain_graph=True)])
    return [Sizes(*sizes) for sizes in zip(*found, strict=True)]


def _size_of_segment(x: Tensor, grad: Tensor, s: LoraSegment, signed: bool) -> Tensor:
    """What has the sizes as its gradients: in each product one factor is free, and the others are absolute values."""
    sizes = x.abs() @ s.lora_a.abs().t(), grad.abs() @ s.lora_b.abs().t()
    hidden, back = (x @ s.lora_a.t(), grad @ s.lora_b.t()) if signed else sizes
    of_x_and_a = (s.gates * back).abs().detach() * sizes[0]
    of_b = (s.gates * hidden).abs().detach() * sizes[1]
    of_gates = s.gates * (hidden * back).abs().detach()
    return (of_x_and_a + of_b + of_gates).sum()
