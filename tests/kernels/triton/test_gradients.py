"""Gradients of the Triton kernels against autograd in float64: run by tests/kernels/test_triton.py."""

import pytest
import torch

from loraplex.kernels.segmented import gated_lora_segmented
from loraplex.kernels.segments import LoraSegment
from tests.kernels.rounding import Sizes, doubled, excess, gradient_sizes, output_sizes, worst_excess
from tests.kernels.triton_cases import make_case

SPANS = [(0, 9, 0), (4, 9, 1), (9, 10, 2), (11, 31, 1)]


def leaves_of(case):
    """x, y, factors and gates as leaves, in the case's dtype; the slots' factors may be used by several segments."""
    slots = [
        (a, b) for of_a, of_b in zip(case.lora_a, case.lora_b, strict=True) for a, b in zip(of_a, of_b, strict=True)
    ]
    return [case.x, *case.ys, *(factor for slot in slots for factor in slot), case.gates]


def arguments_of(case, leaves, rank_gates=None):
    """ys, x and segments made of the leaves; `rank_gates` are those of the last segments instead."""
    num = len(case.ys)
    x, ys, gates = leaves[0], leaves[1 : 1 + num], leaves[-1]
    factors = iter(leaves[1 + num : -1])
    by_slot = [[(next(factors), next(factors)) for _ in range(num)] for _ in case.lora_a]
    segments = []
    for p in range(num):
        segments.append([])
        for start, stop, slot, first in case.rows:
            gate = (gates if gates.ndim == 1 else gates[p])[first : first + stop - start] * case.scalings[slot, p].to(
                gates
            )
            segments[p].append(LoraSegment(start, stop, *by_slot[slot][p], gate))
        if rank_gates is not None:
            segments[p][-1] = segments[p][-1]._replace(gates=rank_gates)
    return ys, x, segments


def weights_of(outs):
    """The outputs' gradients: those of their weighted sum."""
    return [torch.linspace(-1, 1, out.numel()).bfloat16().to(out.dtype).view_as(out) for out in outs]


def gradients(kernel, arguments, wanted):
    """The outputs, and the gradients of what is wanted."""
    ys, x, segments = arguments
    outs = kernel([y * 1.0 for y in ys], x, segments)
    loss = sum((out * weight).sum() for out, weight in zip(outs, weights_of(outs), strict=True))
    return [out.detach() for out in outs], list(torch.autograd.grad(loss, wanted, retain_graph=True))


def torch_kernel(ys, x, segments):
    return [gated_lora_segmented(y, x, of_one) for y, of_one in zip(ys, segments, strict=True)]


def triton_kernel(ys, x, segments):
    from loraplex.kernels.triton.autograd import gated_lora_triton_grad

    return gated_lora_triton_grad(ys, x, segments)


def both(case, dtype, rank_gates=None):
    """Ours in `dtype`, the expected ones in float64, and their sizes; outputs and gradients."""
    made = []
    for kernel, precision in ((triton_kernel, dtype), (torch_kernel, torch.float64)):
        leaves = [t.detach().to(precision).requires_grad_() for t in leaves_of(case)[:-1]]
        leaves.append(case.gates.detach().to(torch.promote_types(precision, torch.float32)).requires_grad_())
        own = None if rank_gates is None else rank_gates.detach().to(leaves[-1].dtype).requires_grad_()
        arguments, wanted = arguments_of(case, leaves, own), [*leaves, *([] if own is None else [own])]
        outs, grads = gradients(kernel, arguments, wanted)
        made.append(outs + grads)
    ys, x, segments = arguments
    sizes = [output_sizes(y.detach(), x.detach(), detached(of_one)) for y, of_one in zip(ys, segments, strict=True)]
    return *made, sizes + gradient_sizes(ys, x, segments, weights_of(ys), wanted)


def detached(segments):
    return [s._replace(lora_a=s.lora_a.detach(), lora_b=s.lora_b.detach(), gates=s.gates.detach()) for s in segments]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gates", ["dense", "one-hot", "of modules"])
def test_gradients_equal_float64(dtype, gates):
    case = make_case([3, 17, 1], SPANS, num_tokens=31, num_in=40, outs=[24, 9], dtype=dtype, gates=gates)
    assert worst_excess(*both(case, dtype)) <= 1


def test_gradients_of_a_gate_for_each_rank():
    """Stacked experts: one segment whose rank rows have gates of their own; rank 65 takes two blocks."""
    case = make_case([65, 4], [(1, 8, 1), (2, 6, 0)], num_tokens=9, num_in=24, outs=[16])
    assert worst_excess(*both(case, torch.float32, rank_gates=torch.randn(4, 65))) <= 1


def test_only_wanted_gradients_are_computed():
    case = make_case([4], [(0, 3, 0)], num_tokens=3, num_in=8, outs=[6])
    b = case.lora_b[0][0].requires_grad_()
    (y,) = triton_kernel([case.ys[0].clone()], case.x, [[LoraSegment(0, 3, case.lora_a[0][0], b, 0.5)]])
    (grad,) = torch.autograd.grad(y.sum(), [b])
    x, a = case.x.double(), case.lora_a[0][0].double()
    expected, terms = (
        (of_x @ of_a.t() * 0.5).sum(0).unsqueeze(1).expand(4, 6) for of_x, of_a in ((x, a), (x.abs(), a.abs()))
    )
    assert excess(grad, expected, Sizes(terms, terms)) <= 1


def test_a_wrong_gate_shows_in_every_gradient_but_that_of_y():
    """The comparison sees gates that are off: it can fail."""
    case = make_case([3, 17, 1], SPANS, num_tokens=31, num_in=40, outs=[24])
    _, expected, sizes = both(case, torch.float32)
    wrong = make_case([3, 17, 1], SPANS, num_tokens=31, num_in=40, outs=[24])
    wrong.gates.add_(1.0)
    ours, _, _ = both(wrong, torch.float32)
    off = [excess(*of_one) for of_one in zip(ours, expected, sizes, strict=True)]
    # out, x, y, then the slots' factors; the last is the gates' own gradient, which they don't enter.
    assert off[2] <= 1
    assert min(off[:2] + off[3:-1]) > 1000


def test_projections_with_other_segments_are_launched_apart():
    case = make_case([4, 6], [(0, 3, 0), (3, 5, 1)], num_tokens=5, num_in=16, outs=[8, 12, 8])
    segments = case.segments()
    segments[1] = segments[1][1:]
    segments[2] = []
    ours = triton_kernel([y.clone() for y in case.ys], case.x, segments)
    expected = torch_kernel([y.double() for y in case.ys], case.x.double(), [doubled(of_one) for of_one in segments])
    sizes = [output_sizes(y, case.x, of_one) for y, of_one in zip(case.ys, segments, strict=True)]
    assert worst_excess(ours, expected, sizes) <= 1
