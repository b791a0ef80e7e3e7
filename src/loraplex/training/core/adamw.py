"""AdamW on one flat parameter, for whoever decides its settings: a schedule, or a client at every step."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

_PREFIX = "optimizer."  # of its tensors in a checkpoint
STEP = f"{_PREFIX}step"


class FlatAdamW:
    """One fused update for all factors; the gradient is zeroed after each step and never freed."""

    def __init__(self, flat: nn.Parameter, learning_rate: float, weight_decay: float = 0.0) -> None:
        self.flat = flat
        self.adamw = torch.optim.AdamW([flat], learning_rate, weight_decay=weight_decay, fused=True)

    @property
    def gradient(self) -> Tensor:
        assert self.flat.grad is not None, "the flat gradient is never freed"
        return self.flat.grad

    def configure(self, **settings: float | tuple[float, float]) -> None:
        """Set options of torch's AdamW (lr, betas, eps, weight_decay) for the steps to come."""
        self.adamw.param_groups[0].update(settings)

    def clip(self, max_norm: float | None) -> float:
        """Clip the gradient, unless `max_norm` is None; return its norm before."""
        return float(torch.nn.utils.clip_grad_norm_([self.flat], math.inf if max_norm is None else max_norm))

    def step(self) -> None:
        """Take the step that the gradient asks for, and start the next one's from 0."""
        self.adamw.step()
        self.gradient.zero_()

    def forget(self) -> None:
        """Begin anew: no moments, and no gradient."""
        self.adamw.state.clear()
        self.gradient.zero_()

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps; nothing before the first step."""
        return {f"{_PREFIX}{name}": value for name, value in self.adamw.state[self.flat].items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Become what `tensors` were taken from; those of other names are passed over."""
        self.adamw.state[self.flat] = {
            name.removeprefix(_PREFIX): tensor.to(self.flat.device, copy=True)
            for name, tensor in tensors.items()
            if name.startswith(_PREFIX)
        }
