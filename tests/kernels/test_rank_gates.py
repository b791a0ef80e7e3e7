"""Segments with a gate for each rank row (stacked experts), and segments that are the whole batch."""

import pytest
import torch
from torch import Tensor

from loraplex.kernels.segmented import gated_lora_embedding, gated_lora_segmented
from loraplex.kernels.segments import LoraSegment

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


def gradients(y: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad((y * torch.arange(y.numel()).view_as(y)).sum(), leaves))


def test_stacked_experts_equal_their_sum_with_all_gradients() -> None:
    x, lora_a, lora_b, gates = tensors()
    rows = torch.arange(len(RANKS)).repeat_interleave(torch.tensor(RANKS))
    segment = LoraSegment(0, TOKENS, torch.cat(lora_a), torch.cat(lora_b), gates.index_select(1, rows))
    y = gated_lora_segmented(torch.zeros(TOKENS, OUT, dtype=torch.float64), x, [segment])
    wanted = expected(x, lora_a, lora_b, gates)
    assert torch.allclose(y, wanted)
    leaves = [x, gates, *lora_a, *lora_b]
    for ours, theirs in zip(gradients(y, leaves), gradients(wanted, leaves), strict=True):
        assert torch.allclose(ours, theirs)


@pytest.mark.parametrize("stop", [TOKENS, TOKENS - 2])
def test_an_embedding_adapter_on_the_whole_batch_has_gradients(stop: int) -> None:
    draw = torch.Generator().manual_seed(1)
    lora_a = torch.randn(2, VOCAB, generator=draw).requires_grad_()
    lora_b = torch.randn(2, OUT, generator=draw).requires_grad_()
    gates = torch.randn(stop, 2, generator=draw).requires_grad_()
    ids = torch.tensor([3, 1, 4, 1, 5, 9, 2])
    base = torch.randn(1, TOKENS, OUT, generator=draw)
    y = gated_lora_embedding(base, ids[None], [LoraSegment(0, stop, lora_a, lora_b, gates)])
    added = (lora_a.t()[ids[:stop]] * gates) @ lora_b
    wanted = base + torch.cat([added, torch.zeros(TOKENS - stop, OUT)])
    assert torch.allclose(y, wanted)
    leaves = [lora_a, lora_b, gates]
    for ours, theirs in zip(gradients(y, leaves), gradients(wanted, leaves), strict=True):
        assert torch.allclose(ours, theirs)
