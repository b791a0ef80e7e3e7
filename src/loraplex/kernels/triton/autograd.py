"""The gated LoRA layer with gradients in x, factors and gates, for adapters and scaling heads in training."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from loraplex.kernels.segments import LoraSegment
from loraplex.kernels.triton.expand import expand
from loraplex.kernels.triton.outer import outer
from loraplex.kernels.triton.shrink import MAX_PROJECTIONS, rank_block, shrink
from loraplex.kernels.triton.work import LARGE_TILE_TOKENS, WorkList, make_work


def gated_lora_triton_grad(
    ys: Sequence[Tensor],  # [.., out] each, contiguous, changed in place
    x: Tensor,  # [.., in]  shared by all
    segments: Sequence[Sequence[LoraSegment]],  # of each y
) -> list[Tensor]:
    """Add every segment's adapter to its y; differentiable in x, factors and gates.

    y_p[t] += gates[t] * lora_b^T lora_a x[t] for t in [start, stop). Projections whose segments have the same tokens
    share their launches. Dropout is for the torch kernel to draw.
    """
    done: list[Tensor] = []
    while len(done) < len(ys):
        spans = [segment[:2] for segment in segments[len(done)]]
        stop = len(done) + 1
        while stop < min(len(ys), len(done) + MAX_PROJECTIONS) and [s[:2] for s in segments[stop]] == spans:
            stop += 1
        chosen = segments[len(done) : stop]
        factors = [t for of_one in chosen for s in of_one for t in (s.lora_a, s.lora_b, s.gates)]
        if spans:
            done += _GatedLora.apply(x, chosen, *ys[len(done) : stop], *factors)
        else:
            done += ys[len(done) : stop]
    return done


class _Layout(NamedTuple):
    """Where the segments' factors, tokens and rows in rank space are; segments are slots, projections are modules."""

    work: WorkList
    table: Tensor  # [segments, projections, 3]  int64
    ones: Tensor  # [segments, projections]  float32: LoRA scaling is in the gates
    rows: list[tuple[int, int]]  # of each segment, first and end
    max_rank: int
    aligned: bool
    held: list[Tensor]  # the factors in x's dtype, by projection and segment, which the table points to


class _GatedLora(torch.autograd.Function):
    """Explicit gradients: a step keeps one row in rank space for each token and segment, and no copies of y."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, segments: Sequence[Sequence[LoraSegment]], *tensors: Any) -> tuple[Tensor, ...]:
        ys = tensors[: len(segments)]
        flat_x = x.reshape(-1, x.shape[-1]).contiguous()
        layout = _lay_out(segments, flat_x)
        gates = _dense_gates(segments, layout)
        _, width = rank_block(layout.max_rank)
        zeros = torch.zeros(1, len(segments), layout.work.num_rows, width, device=x.device)
        modules = range(len(segments))
        hidden = shrink(
            flat_x, layout.table, layout.ones, modules, layout.work, None, layout.max_rank,
            aligned=layout.aligned, hidden=zeros,
        )  # fmt: skip
        gated = hidden * gates
        flat_ys = [y.view(-1, y.shape[-1]) for y in ys]
        expand(flat_ys, gated, layout.table, modules, layout.work, layout.max_rank, aligned=layout.aligned)
        if any(ctx.needs_input_grad):
            ctx.segments, ctx.layout = segments, layout
            ctx.save_for_backward(x, hidden, gates)
        ctx.mark_dirty(*ys)
        return ys

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_ys: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, gates = ctx.saved_tensors
        segments, layout = ctx.segments, ctx.layout
        needs = iter(ctx.needs_input_grad[2 + len(segments) :])
        flat_x = x.reshape(-1, x.shape[-1]).contiguous()
        flat_grads = [g.reshape(-1, g.shape[-1]).to(x.dtype).contiguous() for g in grad_ys]
        grad_gated = torch.cat([_into_rank_space(g, p, hidden, layout) for p, g in enumerate(flat_grads)], dim=1)
        grad_hidden = grad_gated * gates
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.zeros_like(flat_x)
            expand(
                [grad_x], grad_hidden, layout.table, range(len(segments)), layout.work, layout.max_rank,
                column=0, aligned=layout.aligned,
            )  # fmt: skip
            grad_x = grad_x.view_as(x)
        grads: list[Tensor | None] = []
        for p, of_one in enumerate(segments):
            wanted = [(next(needs), next(needs), next(needs)) for _ in of_one]
            spans = [
                (s.start, s.stop - s.start, s.lora_a.shape[0], first)
                for s, (first, _) in zip(of_one, layout.rows, strict=True)
            ]
            of_a = outer(grad_hidden[0, p], flat_x, spans, layout.max_rank) if any(w[0] for w in wanted) else []
            of_b = (
                outer((hidden * gates)[0, p], flat_grads[p], spans, layout.max_rank)
                if any(w[1] for w in wanted)
                else []
            )
            shares = (grad_gated * hidden)[0, p]
            for i, (segment, (wants_a, wants_b, wants_gates)) in enumerate(zip(of_one, wanted, strict=True)):
                grads += [
                    of_a[i].to(segment.lora_a.dtype) if wants_a else None,
                    of_b[i].to(segment.lora_b.dtype) if wants_b else None,
                    _gate_gradient(segment, shares[slice(*layout.rows[i])]) if wants_gates else None,
                ]
        return grad_x, None, *grad_ys, *grads


def _into_rank_space(grad_y: Tensor, projection: int, like: Tensor, layout: _Layout) -> Tensor:
    """grad_y lora_b^T [1, 1, rows, width]."""
    return shrink(
        grad_y, layout.table, layout.ones, [projection], layout.work, None, layout.max_rank,
        column=1, aligned=layout.aligned, hidden=torch.zeros_like(like[:, :1]),
    )  # fmt: skip


def _lay_out(segments: Sequence[Sequence[LoraSegment]], x: Tensor) -> _Layout:
    held: list[Tensor] = []
    table: list[list[list[int]]] = [[] for _ in segments[0]]
    for of_one in segments:
        for cells, segment in zip(table, of_one, strict=True):
            a, b = (factor.detach().to(x.dtype).contiguous() for factor in (segment.lora_a, segment.lora_b))
            held += [a, b]
            cells.append([a.data_ptr(), b.data_ptr(), a.shape[0]])
    rows, first = [], 0
    for segment in segments[0]:
        rows.append((first, first + segment.stop - segment.start))
        first = rows[-1][1]
    spans = [(s.start, s.stop, i, row) for i, (s, (row, _)) in enumerate(zip(segments[0], rows, strict=True))]
    return _Layout(
        work=make_work(
            spans, LARGE_TILE_TOKENS, x.device
        ),  # whose sums are in one part, as gates and gradients want them
        table=torch.tensor(table, dtype=torch.int64, device=x.device),
        ones=torch.ones(len(segments[0]), len(segments), device=x.device),
        rows=rows,
        max_rank=max(s.lora_a.shape[0] for of_one in segments for s in of_one),
        aligned=all(factor.data_ptr() % 16 == 0 for factor in held),
        held=held,
    )


def _dense_gates(segments: Sequence[Sequence[LoraSegment]], layout: _Layout) -> Tensor:
    """[1, projections, rows, 1], or [.., width] where a segment has a gate for each rank row; float32."""
    has_rank_gates = any(isinstance(s.gates, Tensor) and s.gates.ndim == 2 for of_one in segments for s in of_one)
    width = rank_block(layout.max_rank)[1] if has_rank_gates else 1
    gates = torch.zeros(1, len(segments), layout.work.num_rows, width, device=layout.ones.device)
    for p, of_one in enumerate(segments):
        for segment, rows in zip(of_one, layout.rows, strict=True):
            own = gates[0, p, slice(*rows)]
            if not isinstance(segment.gates, Tensor):
                own.fill_(segment.gates)
            elif segment.gates.ndim == 2:
                own[:, : segment.gates.shape[1]] = segment.gates.detach()
            else:
                own.copy_(segment.gates.detach().unsqueeze(1).expand_as(own))
    return gates


def _gate_gradient(segment: LoraSegment, shares: Tensor) -> Tensor:
    """From the rows' products of gradient and state in rank space [tokens, width] to the segment's gates."""
    assert isinstance(segment.gates, Tensor), "a gate without a tensor needs no gradient"
    if segment.gates.ndim == 2:
        return shares[:, : segment.gates.shape[1]].to(segment.gates.dtype)
    return shares[:, : segment.lora_a.shape[0]].sum(dim=1).to(segment.gates.dtype)
