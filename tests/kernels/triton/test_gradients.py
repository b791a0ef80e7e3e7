"""Gradients of the Triton kernels against autograd in float64: run by tests/kernels/test_triton.py."""

import pytest
import torch

from loraplex.kernels.segmented import gated_lora_segmented
from loraplex.kernels.segments import LoraSegment
from loraplex.kernels.triton.available import is_interpreted
from tests.kernels.triton_cases import make_case, worst_error

pytestmark = pytest.mark.skipif(not is_interpreted(), reason="in a process of its own: tests/kernels/test_triton.py")
SPANS = [(0, 9, 0), (4, 9, 1), (9, 10, 2), (11, 31, 1)]
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-2}


def leaves_of(case):
    """x, y, factors and gates as leaves, in the case's dtype; the slots' factors may be used by several segments."""
    slots = [
        (a, b) for of_a, of_b in zip(case.lora_a, case.lora_b, strict=True) for a, b in zip(of_a, of_b, strict=True)
    ]
    return [case.x, *case.ys, *(factor for slot in slots for factor in slot), case.gates]


def gradients(kernel, case, leaves, rank_gates=None):
    """The gradients of a weighted sum of the outputs; `rank_gates` are given to the last segments instead."""
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
    outs = kernel([y * 1.0 for y in ys], x, segments)
    weights = [torch.linspace(-1, 1, out.numel()).bfloat16().to(out.dtype).view_as(out) for out in outs]
    loss = sum((out * weight).sum() for out, weight in zip(outs, weights, strict=True))
    wanted = [*leaves, rank_gates] if rank_gates is not None else leaves
    return [out.detach() for out in outs], list(torch.autograd.grad(loss, wanted))


def torch_kernel(ys, x, segments):
    return [gated_lora_segmented(y, x, of_one) for y, of_one in zip(ys, segments, strict=True)]


def triton_kernel(ys, x, segments):
    from loraplex.kernels.triton.autograd import gated_lora_triton_grad

    return gated_lora_triton_grad(ys, x, segments)


def both(case, dtype, rank_gates=None):
    """Ours in `dtype`, the expected ones in float64; outputs and gradients."""
    made = []
    for kernel, precision in ((triton_kernel, dtype), (torch_kernel, torch.float64)):
        leaves = [t.detach().to(precision).requires_grad_() for t in leaves_of(case)[:-1]]
        leaves.append(case.gates.detach().to(torch.promote_types(precision, torch.float32)).requires_grad_())
        own = None if rank_gates is None else rank_gates.detach().to(leaves[-1].dtype).requires_grad_()
        outs, grads = gradients(kernel, case, leaves, own)
        made.append(outs + grads)
    return made


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("gates", ["dense", "one-hot", "of modules"])
def test_gradients_equal_float64(dtype, gates):
    case = make_case([3, 17, 1], SPANS, num_tokens=31, num_in=40, outs=[24, 9], dtype=dtype, gates=gates)
    ours, expected = both(case, dtype)
    assert worst_error(ours, expected) <= TOLERANCE[dtype]


def test_gradients_of_a_gate_for_each_rank():
    """Stacked experts: one segment whose rank rows have gates of their own; rank 65 takes two blocks."""
    case = make_case([65, 4], [(1, 8, 1), (2, 6, 0)], num_tokens=9, num_in=24, outs=[16])
    ours, expected = both(case, torch.float32, rank_gates=torch.randn(4, 65))
    assert worst_error(ours, expected[:-2] + expected[-2:]) <= 1e-3


def test_only_wanted_gradients_are_computed():
    case = make_case([4], [(0, 3, 0)], num_tokens=3, num_in=8, outs=[6])
    b = case.lora_b[0][0].requires_grad_()
    (y,) = triton_kernel([case.ys[0].clone()], case.x, [[LoraSegment(0, 3, case.lora_a[0][0], b, 0.5)]])
    (grad,) = torch.autograd.grad(y.sum(), [b])
    expected = (case.x @ case.lora_a[0][0].t() * 0.5).double().sum(0).unsqueeze(1).expand(4, 6)
    assert worst_error([grad], [expected]) <= 1e-3


def test_a_wrong_gate_shows_in_every_gradient_but_that_of_y():
    """The comparison sees gates that are off: it can fail."""
    case = make_case([3, 17, 1], SPANS, num_tokens=31, num_in=40, outs=[24])
    _, expected = both(case, torch.float32)
    wrong = make_case([3, 17, 1], SPANS, num_tokens=31, num_in=40, outs=[24])
    wrong.gates.add_(1.0)
    ours, _ = both(wrong, torch.float32)
    off = [worst_error([mine], [theirs]) for mine, theirs in zip(ours, expected, strict=True)]
    # out, x, y, then the slots' factors; the last is the gates' own gradient, which they don't enter.
    assert off[2] <= 1e-6
    assert min(off[:2] + off[3:-1]) > 0.05


def test_projections_with_other_segments_are_launched_apart():
    case = make_case([4, 6], [(0, 3, 0), (3, 5, 1)], num_tokens=5, num_in=16, outs=[8, 12, 8])
    segments = case.segments()
    segments[1] = segments[1][1:]
    segments[2] = []
    ours = triton_kernel([y.clone() for y in case.ys], case.x, segments)
    expected = torch_kernel([y.clone() for y in case.ys], case.x, segments)
    assert worst_error(ours, [e.double() for e in expected]) <= 1e-5
