"""A matrix product for each segment: the differentiable path, and the fast one for long segments (prefill)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from loraplex.kernels.batched_segments import BatchedLora, equal_parts
from loraplex.kernels.segments import LoraSegment


def gated_lora_segmented(y: Tensor, x: Tensor, segments: Sequence[LoraSegment]) -> Tensor:
    """Add every segment's adapter to `y` in place and return it; differentiable in x, factors and gates.

    y[t] += gates[t] * lora_b^T lora_a x[t] for t in [start, stop); y [.., out], x [.., in], tokens flattened. While
    factors train, segments share products if they can; elsewhere a segment has the same bits beside any others.
    """
    factors = [tensor for segment in segments for tensor in (segment.lora_a, segment.lora_b, segment.gates)]
    trains = torch.is_grad_enabled() and any(isinstance(one, Tensor) and one.requires_grad for one in factors)
    parts = equal_parts(segments) if trains else None
    if parts is not None:
        return BatchedLora.apply(y, x, segments, parts, *factors)
    return _SegmentedLora.apply(y, x, segments, *factors)


def gated_lora_embedding(y: Tensor, ids: Tensor, segments: Sequence[LoraSegment]) -> Tensor:
    """Return `y` plus every segment's embedding adapter: lora_a [rank, vocab] is looked up by id.

    y[t] + gates[t] * lora_b^T lora_a[:, ids[t]]; y [.., hidden], ids [..].
    """
    flat_ids = ids.reshape(-1)
    total = y.clone().view(-1, y.shape[-1])
    for segment in segments:
        hidden = segment.lora_a.t()[flat_ids[segment.start : segment.stop]]  # [n, rank]
        # Not +=, which assigns the slice to itself: for a slice that is the whole, autograd refuses that.
        total[segment.start : segment.stop].add_((_gate(hidden, segment.gates) @ segment.lora_b).to(y.dtype))
    return total.view_as(y)


def _gate(hidden: Tensor, gates: Tensor | float) -> Tensor:
    if isinstance(gates, float):
        return hidden * gates
    gates = gates.to(hidden.dtype)
    return hidden * (gates if gates.ndim == 2 else gates.unsqueeze(-1))


def _keep_mask(x: Tensor, segment: LoraSegment) -> Tensor:
    """Inverted dropout: 0 with probability `dropout`, else 1 / (1 - dropout)."""
    draw = torch.rand(x.shape, generator=segment.generator, device=x.device)
    return (draw >= segment.dropout).to(x.dtype).div_(1 - segment.dropout)


def _cover(segments: Sequence[LoraSegment], num_tokens: int) -> bool:
    """Whether each token is in exactly one segment, all without dropout."""
    ends = [0, *(segment.stop for segment in segments)]
    starts = [*(segment.start for segment in segments), num_tokens]
    return ends == starts and not any(segment.dropout > 0 for segment in segments)


class _SegmentedLora(torch.autograd.Function):
    """Explicit gradients, so that a step keeps one [n, rank] tensor a segment and no copies of y."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, segments: Sequence[LoraSegment], *factors: Tensor | float) -> Tensor:
        flat_x, flat_y = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        saved: list[Tensor | None] = []
        for segment in segments:
            x_part = flat_x[segment.start : segment.stop]
            mask = _keep_mask(x_part, segment) if segment.dropout > 0 else None
            a, b = segment.lora_a.to(x.dtype), segment.lora_b.to(x.dtype)
            hidden = (x_part if mask is None else x_part * mask) @ a.t()  # [n, rank]
            flat_y[segment.start : segment.stop].addmm_(_gate(hidden, segment.gates), b)
            saved += [hidden, mask]
        if any(ctx.needs_input_grad):
            ctx.segments = segments
            ctx.num_saved = len(saved)
            tensors = [factor for factor in factors if isinstance(factor, Tensor)]
            ctx.save_for_backward(x, *saved, *tensors)
        ctx.mark_dirty(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        needs_y, needs_x, _, *needs_factors = ctx.needs_input_grad
        flat_x, flat_grad = x.reshape(-1, x.shape[-1]), grad_y.reshape(-1, grad_y.shape[-1])
        fills_x = _cover(ctx.segments, len(flat_x))
        grad_x = (torch.empty_like(flat_x) if fills_x else torch.zeros_like(flat_x)) if needs_x else None
        grads: list[Tensor | None] = []
        for i, segment in enumerate(ctx.segments):
            hidden, mask = saved[2 * i], saved[2 * i + 1]
            needs_a, needs_b, needs_gates = needs_factors[3 * i : 3 * i + 3]
            g = flat_grad[segment.start : segment.stop]
            a, b = segment.lora_a.to(x.dtype), segment.lora_b.to(x.dtype)
            grad_gated = g @ b.t()  # [n, rank]
            grad_hidden = _gate(grad_gated, segment.gates)
            if needs_a:
                x_part = flat_x[segment.start : segment.stop]
                grad_a = grad_hidden.t() @ (x_part if mask is None else x_part * mask)
            if needs_b:
                grad_b = _gate(hidden, segment.gates).t() @ g
            if needs_gates:
                grad_gates = grad_gated * hidden if segment.gates.ndim == 2 else (grad_gated * hidden).sum(-1)
            if grad_x is not None and fills_x:
                torch.mm(grad_hidden, a, out=grad_x[segment.start : segment.stop])
            elif grad_x is not None and mask is None:
                grad_x[segment.start : segment.stop].addmm_(grad_hidden, a)
            elif grad_x is not None:
                grad_x[segment.start : segment.stop] += (grad_hidden @ a) * mask
            grads += [
                grad_a.to(segment.lora_a.dtype) if needs_a else None,
                grad_b.to(segment.lora_b.dtype) if needs_b else None,
                grad_gates.to(segment.gates.dtype) if needs_gates else None,
            ]
        return grad_y if needs_y else None, None if grad_x is None else grad_x.view_as(x), None, *grads
