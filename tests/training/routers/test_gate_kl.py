"""What a teacher's gates teach where its softmax is off, where nothing is kept, and where experts are missing."""

import math

import pytest
import torch
from torch import Tensor

from loraplex.training.routers.teacher import gate_kl

LOGITS = torch.tensor([[0.5, -1.0, 2.0]])
NONE = float("-inf")


def expected(target: list[float], logits: list[float]) -> float:
    """sum t log(t / softmax(logits)), written out."""
    total = sum(math.exp(logit) for logit in logits)
    pairs = zip(target, logits, strict=True)
    return sum(t * (math.log(t) - logit + math.log(total)) for t, logit in pairs if t > 0)


def found(scalings: list[float], logits: Tensor, *, is_softmax: bool = True, temperature: float = 1.0) -> float:
    return float(gate_kl(torch.tensor([scalings]), logits, temperature=temperature, is_softmax=is_softmax)[0])


@pytest.mark.parametrize(
    ("scalings", "target"),
    [
        ([0.2, 0.3, 0.5], [0.2, 0.3, 0.5]),
        ([0.0, 0.3, 0.5], [0.0, 0.375, 0.625]),  # top-k kept two, which add up to less than 1
        ([-3.0, 1.0, 3.0], [0.0, 0.25, 0.75]),  # no softmax: what is negative counts as 0
        ([1.0, 0.0, 0.0], [1.0, 0.0, 0.0]),
    ],
)
def test_a_softmax_learns_the_teachers_shares(scalings: list[float], target: list[float]) -> None:
    assert found(scalings, LOGITS) == pytest.approx(expected(target, LOGITS[0].tolist()), rel=1e-5)
    halved = [logit / 0.5 for logit in LOGITS[0].tolist()]
    assert found(scalings, LOGITS, temperature=0.5) == pytest.approx(expected(target, halved), rel=1e-5)


def test_a_token_of_which_nothing_is_kept_teaches_nothing() -> None:
    for is_softmax in (True, False):
        logits = LOGITS.clone().requires_grad_(True)
        value = gate_kl(torch.tensor([[-1.0, 0.0, -2.0]]), logits, temperature=1.0, is_softmax=is_softmax).sum()
        value.backward()
        if is_softmax:
            assert float(value.detach()) == 0
            assert logits.grad is not None
            assert not logits.grad.any()
    logits = LOGITS.clone().masked_fill(torch.tensor([[False, True, False]]), NONE)
    assert found([0.0, 1.0, 0.0], logits) == 0, "only an expert that isn't there was kept"


@pytest.mark.parametrize("is_softmax", [True, False])
def test_missing_experts_take_no_part(is_softmax: bool) -> None:
    logits = torch.tensor([[0.5, NONE, 2.0]], requires_grad=True)
    value = gate_kl(torch.tensor([[0.2, 0.3, 0.5]]), logits, temperature=1.0, is_softmax=is_softmax).sum()
    value.backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    assert logits.grad[0, 1] == 0
    two = torch.tensor([[0.5, 2.0]])
    assert float(value.detach()) == pytest.approx(found([0.2, 0.5], two, is_softmax=is_softmax), rel=1e-5)


def test_sigmoids_learn_each_scaling_cut_to_a_probability() -> None:
    value = 0.0
    for t, logit in zip((0.0, 0.4, 1.0), LOGITS[0].tolist(), strict=True):
        p = 1 / (1 + math.exp(-logit))
        value += (t * math.log(t / p) if t else 0.0) + ((1 - t) * math.log((1 - t) / (1 - p)) if t < 1 else 0.0)
    assert found([-0.5, 0.4, 1.7], LOGITS, is_softmax=False) == pytest.approx(value, rel=1e-5)
