"""Segments with a gate for each rank row (stacked experts), and segments that are the whole batch."""

import pytest
import torch
from torch import Tensor

from loraplex.kernels.segmented import gated_lora_embedding, gated_lora_segmented
from loraplex.kernels.segments import LoraSegment
from tests.kernels.rounding import excess, gradient_sizes, output_sizes, worst_excess

TOKENS, IN, OUT, VOCAB = 7, 5, 6, 11
RANKS = (2, 3, 1)


def tensors() -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    """x, the experts' factors, and gates [tokens, experts]; float64, all leaves."""
    draw = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64).requires_grad_()

    return leaf(TOKENS, IN), [leaf(r, IN) for r in RANKS], [leaf(r, OUT) for r in RANKS], leaf(TOKENS, len(RANKS))


def expected(x: Tensor, lora_a: list[Tensor], lora_b: list[Tensor], gates: Tensor) -> Tensor:
    terms = [gates[:, i, None] * (x @ a.t() @ b) for i, (a, b) in enumerate(zip(lora_a, lora_b, strict=True))]
    return torch.stack(terms).sum(dim=0)


def weights_of(y: Tensor) -> Tensor:
    return torch.arange(y.numel(), dtype=torch.float64).view_as(y)


def gradients(y: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad((y * weights_of(y).to(y.dtype)).sum(), leaves))


def test_stacked_experts_equal_their_sum_with_all_gradients() -> None:
    x, lora_a, lora_b, gates = tensors()
    rows = torch.arange(len(RANKS)).repeat_interleave(torch.tensor(RANKS))
    segment = LoraSegment(0, TOKENS, torch.cat(lora_a), torch.cat(lora_b), gates.index_select(1, rows))
    y = gated_lora_segmented(torch.zeros(TOKENS, OUT, dtype=torch.float64), x, [segment])
    wanted = expected(x, lora_a, lora_b, gates)
    assert excess(y, wanted, output_sizes(torch.zeros_like(y), x, [segment])) <= 1
    leaves = [x, gates, *lora_a, *lora_b]
    sizes = gradient_sizes([torch.zeros_like(y)], x, [[segment]], [weights_of(y)], leaves)
    assert worst_excess(gradients(y, leaves), gradients(wanted, leaves), sizes) <= 1


@pytest.mark.parametrize("stop", [TOKENS, TOKENS - 2])
def test_an_embedding_adapter_on_the_whole_batch_has_gradients(stop: int) -> None:
    draw = torch.Generator().manual_seed(1)
    lora_a = torch.randn(2, VOCAB, generator=draw).requires_grad_()
    lora_b = torch.randn(2, OUT, generator=draw).requires_grad_()
    gates = torch.randn(stop, 2, generator=draw).requires_grad_()
    ids = torch.tensor([3, 1, 4, 1, 5, 9, 2])
    base = torch.randn(1, TOKENS, OUT, generator=draw)
    y = gated_lora_embedding(base, ids[None], [LoraSegment(0, stop, lora_a, lora_b, gates)])
    leaves, exact = (
        [lora_a, lora_b, gates],
        [leaf.detach().double().requires_grad_() for leaf in (lora_a, lora_b, gates)],
    )
    a, b, g = exact
    segments, one_hot = [LoraSegment(0, stop, a, b, g)], torch.nn.functional.one_hot(ids, VOCAB).double()
    wanted = base.double() + torch.cat([(a.t()[ids[:stop]] * g) @ b, torch.zeros(TOKENS - stop, OUT)])
    sizes = output_sizes(base[0], one_hot, segments)
    assert excess(y[0], wanted[0], sizes) <= 1
    sizes = gradient_sizes([base[0].double()], one_hot, [segments], [weights_of(y)[0]], exact)
    assert worst_excess(gradients(y, leaves), gradients(wanted, exact), sizes) <= 1
