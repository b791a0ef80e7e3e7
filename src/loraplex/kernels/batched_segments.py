"""One matrix product for many segments: where they lie behind each other and are made of parts of one length."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from loraplex.kernels.segments import LoraSegment

_MAX_PARTS = 4  # parts a segment, on average: smaller ones are more work than the products that they save


class Parts(NamedTuple):
    """Segments that cover [start, stop), cut into parts of `length` tokens."""

    start: int
    stop: int
    length: int
    segments: tuple[int, ...]  # [parts]  the segment of each

    @property
    def are_segments(self) -> bool:
        return self.segments == tuple(range(len(self.segments)))


def equal_parts(segments: Sequence[LoraSegment]) -> Parts | None:
    """The parts of segments that one product can serve; None where a product for each is the better way."""
    if len(segments) < 2 or any(one.stop != other.start for one, other in pairwise(segments)):
        return None
    if any(segment.dropout > 0 or _has_rank_gates(segment) for segment in segments):
        return None
    sizes = [segment.stop - segment.start for segment in segments]
    length = math.gcd(*sizes)
    if length == 0 or sum(sizes) // length > _MAX_PARTS * len(segments):
        return None
    numbers = tuple(number for number, size in enumerate(sizes) for _ in range(size // length))
    return Parts(segments[0].start, segments[-1].stop, length, numbers)


def _has_rank_gates(segment: LoraSegment) -> bool:
    return isinstance(segment.gates, Tensor) and segment.gates.ndim != 1


class BatchedLora(torch.autograd.Function):
    """y[t] += gates[t] * lora_b^T lora_a x[t] of all segments, and its gradients; as kernels/segmented.py has it."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, segments: Sequence[LoraSegment], parts: Parts, *factors: Tensor | float
    ) -> Tensor:
        a, b = (_stacked(own, x.dtype) for own in ([s.lora_a for s in segments], [s.lora_b for s in segments]))
        gates = _gates(segments, parts, x)
        hidden = torch.bmm(_part_of(x, parts), _of_parts(a, parts).transpose(1, 2))  # [parts, length, rank]
        _part_of(y.view(-1, y.shape[-1]), parts).baddbmm_(hidden * gates, _of_parts(b, parts))
        if any(ctx.needs_input_grad):
            ctx.segments, ctx.parts = segments, parts
            ctx.save_for_backward(x, hidden, a, b, *(factor for factor in factors if isinstance(factor, Tensor)))
        ctx.mark_dirty(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, a, b, *_ = ctx.saved_tensors
        segments, parts = ctx.segments, ctx.parts
        needs_y, needs_x, _, _, *needs_factors = ctx.needs_input_grad
        gates = _gates(segments, parts, x)
        g = _part_of(grad_y, parts)
        grad_gated = torch.bmm(g, _of_parts(b, parts).transpose(1, 2))  # [parts, length, rank]
        grad_hidden = grad_gated * gates
        nothing: list[Tensor | None] = [None] * len(segments)
        of_a, of_b, of_gates = nothing, nothing, nothing
        needs_a, needs_b, needs_gates = (any(needs_factors[kind::3]) for kind in range(3))
        if needs_a:
            of_a = _of_factors(torch.bmm(grad_hidden.transpose(1, 2), _part_of(x, parts)), segments, parts)
        if needs_b:
            of_b = _of_factors(torch.bmm((hidden * gates).transpose(1, 2), g), segments, parts)
        if needs_gates:
            of_tokens = (grad_gated * hidden).sum(-1).view(-1)
            of_gates = [of_tokens[one.start - parts.start : one.stop - parts.start] for one in segments]
        grads = []
        for number, segment in enumerate(segments):
            own = ((segment.lora_a, of_a), (segment.lora_b, of_b), (segment.gates, of_gates))
            for (factor, found), needs in zip(own, needs_factors[3 * number : 3 * number + 3], strict=True):
                grad = found[number]
                grads.append(grad.to(factor.dtype) if needs and grad is not None else None)
        grad_x = _whole(torch.bmm(grad_hidden, _of_parts(a, parts)), x, parts) if needs_x else None
        return grad_y if needs_y else None, grad_x, None, None, *grads


def _part_of(tensor: Tensor, parts: Parts) -> Tensor:  # [.., n] -> [parts, length, n]
    flat = tensor.reshape(-1, tensor.shape[-1])
    return flat[parts.start : parts.stop].view(len(parts.segments), parts.length, -1)


def _whole(of_parts: Tensor, x: Tensor, parts: Parts) -> Tensor:  # [parts, length, n] -> [.., n], 0 beside them
    if of_parts.numel() == x.numel():
        return of_parts.view(x.shape)
    whole = torch.zeros_like(x, memory_format=torch.contiguous_format)
    _part_of(whole, parts).copy_(of_parts)
    return whole


def _stacked(factors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """[segments, rank, n]; smaller ranks are filled with zeros."""
    rank = max(len(factor) for factor in factors)
    filled = [F.pad(factor, (0, 0, 0, rank - len(factor))) if len(factor) < rank else factor for factor in factors]
    return torch.stack(filled).to(dtype)


def _of_parts(of_segments: Tensor, parts: Parts) -> Tensor:  # [segments, ..] -> [parts, ..]
    return of_segments if parts.are_segments else of_segments[list(parts.segments)]


def _gates(segments: Sequence[LoraSegment], parts: Parts, x: Tensor) -> Tensor | float:
    """One for all, or [parts, 1 or length, 1]."""
    values = {segment.gates for segment in segments if isinstance(segment.gates, float)}
    if all(isinstance(segment.gates, float) for segment in segments):
        if len(values) == 1:
            return values.pop()
        gates = [segments[number].gates for number in parts.segments]
        return torch.tensor(gates, dtype=x.dtype, device=x.device).view(-1, 1, 1)
    tokens = [
        segment.gates.to(x.dtype)
        if isinstance(segment.gates, Tensor)
        else x.new_full((segment.stop - segment.start,), segment.gates)
        for segment in segments
    ]
    return torch.cat(tokens).view(len(parts.segments), parts.length, 1)


def _of_factors(of_parts: Tensor, segments: Sequence[LoraSegment], parts: Parts) -> list[Tensor | None]:
    """Gradients [parts, rank, n] added up by segment, each of its own rank; infinite ones stay where they are."""
    found: list[Tensor | None] = []
    first = 0
    for segment in segments:
        stop = first + (segment.stop - segment.start) // parts.length
        own = of_parts[first] if stop == first + 1 else of_parts[first:stop].sum(0)
        found.append(own[: len(segment.lora_a)])
        first = stop
    return found
