"""The optimizer of one adapter, without a loop."""

import torch
from torch import nn
from transformers import get_scheduler

from loraplex.training import OptimizerConfig
from loraplex.training.core.train_state import Optimizer

STEPS = 6


def gradients() -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [3 * torch.randn(5, generator=draw) for _ in range(STEPS)]


def test_takes_the_steps_of_adamw_with_clipping_and_schedule() -> None:
    config = OptimizerConfig(learning_rate=0.1, schedule="linear", warmup_steps=2, weight_decay=0.1, max_grad_norm=0.5)
    flat, plain = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))
    flat.grad = torch.zeros(5)
    ours = Optimizer(flat, config, STEPS)
    theirs = torch.optim.AdamW([plain], lr=0.1, weight_decay=0.1)
    schedule = get_scheduler("linear", theirs, 2, STEPS)
    for gradient in gradients():
        ours.gradient.add_(gradient)
        plain.grad = gradient.clone()
        assert ours.learning_rate == schedule.get_last_lr()[0]
        assert ours.clip() == float(nn.utils.clip_grad_norm_([plain], 0.5))
        ours.step()
        theirs.step()
        schedule.step()
        torch.testing.assert_close(flat, plain)
        assert not ours.gradient.any(), "the next step's gradient starts from 0"


def test_goes_on_from_what_it_kept() -> None:
    config = OptimizerConfig(learning_rate=0.1, warmup_steps=1)
    whole, parts = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))
    whole.grad, parts.grad = torch.zeros(5), torch.zeros(5)
    first, second = Optimizer(whole, config, STEPS), Optimizer(parts, config, STEPS)
    for number, gradient in enumerate(gradients()):
        if number == 3:
            tensors, counters = second.tensors(), second.counters()
            second = Optimizer(parts, config, STEPS)
            second.restore(tensors, counters)
        for optimizer in (first, second):
            optimizer.gradient.copy_(gradient)
            optimizer.step()
    assert torch.equal(whole, parts)
