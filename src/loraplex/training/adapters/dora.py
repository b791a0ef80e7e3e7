"""A DoRA in training: y = W x + (c - 1) W x + c s B A x with c = m / ||W + s B A||, a number for each output.

As its paper proposes (arXiv 2402.09353, section 4.3) and PEFT does, the norm counts as a constant in the gradient. So
the base model's rows need c B and c - 1 alone, which are made before each step; what reaches them goes on to B and m:

    dL/dB = c dL/d(cB)    dL/dc = sum over rank of B dL/d(cB) + dL/d(c - 1)    dL/dm = dL/dc / ||W + s B A||

The norm takes no merged weight: ||w + s b A||^2 = ||w||^2 + 2 s b (A w) + s^2 b (A A^T) b for each output's row w of W
and b of B, which costs as much as the forward pass of as many tokens as the rank has.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from loraplex.adapters.config import LoraConfig
from loraplex.adapters.peft.writer import write_adapter
from loraplex.adapters.store.slot_weights import SlotWeights
from loraplex.adapters.weights import Adapter, LoraWeights
from loraplex.layers.attach import AdaptableModel
from loraplex.layers.base.modules import weight_matrix
from loraplex.residual.modules import LinkedResidual
from loraplex.training.adapters.job_state import JobState
from loraplex.training.core.parameters import FlatTensors


@dataclass(frozen=True, kw_only=True)
class _DoraModule:
    """The parameters of one module, and the leaves that the kernels see."""

    module: nn.Module  # of the base model
    scaling: float
    base_squares: Tensor  # [out]  squared norms of W's rows
    lora_a: nn.Parameter  # [rank, in]
    lora_b: nn.Parameter  # [rank, out]
    magnitude: nn.Parameter  # [out]
    scaled_b: Tensor  # [rank, out]  c B
    excess: Tensor  # [out]  c - 1
    norms: Tensor  # [out]  ||W + s B A||, of the last refresh

    @torch.no_grad()
    def _norms(self) -> Tensor:  # [out]
        """||W + s B A|| of each output."""
        weight = weight_matrix(self.module)
        a, b = self.lora_a, self.lora_b
        crossed = (weight @ a.to(weight.dtype).t()).float().t()  # [rank, out]  A w of every row w
        own = ((a @ a.t()) @ b * b).sum(0)
        squares = self.base_squares + 2 * self.scaling * (crossed * b).sum(0) + self.scaling**2 * own
        return squares.clamp_min(torch.finfo(torch.float32).tiny).sqrt()

    @torch.no_grad()
    def refresh(self) -> None:
        self.norms.copy_(self._norms())
        ratio = self.magnitude / self.norms
        self.scaled_b.copy_(self.lora_b * ratio)
        self.excess.copy_(ratio - 1)

    @torch.no_grad()
    def pass_on(self) -> None:
        """Add what reached the leaves to the gradients of B and m."""
        grad_b, grad_c = self.scaled_b.grad, self.excess.grad
        if grad_b is None or grad_c is None:  # no row of this process went through it
            return
        assert self.lora_b.grad is not None, "flat gradients are never freed"
        assert self.magnitude.grad is not None, "flat gradients are never freed"
        self.lora_b.grad.add_(grad_b * (self.magnitude / self.norms))
        self.magnitude.grad.add_(((self.lora_b * grad_b).sum(0) + grad_c) / self.norms)
        self.scaled_b.grad = self.excess.grad = None


class TrainableDora:
    """A DoRA in training; `refresh` comes before the passes of a step or evaluation, `pass_gradients_on` after a
    step's.
    """

    residual: LinkedResidual | None = None

    def __init__(
        self, config: LoraConfig, layers: Mapping[str, LoraWeights], adaptable: AdaptableModel, device: torch.device
    ) -> None:
        """`layers` without a magnitude begin with the norms of W + s B A, so that the first outputs are LoRA's."""
        self.rank = config.r
        self.paths: Sequence[str] = list(layers)
        self._config = config
        self._first = layers
        magnitudes = [_first_magnitude(layer, adaptable.modules[path]) for path, layer in layers.items()]
        tensors = FlatTensors(
            [t for layer, m in zip(layers.values(), magnitudes, strict=True) for t in (layer.lora_a, layer.lora_b, m)],
            device,
        )
        self.flat, self._views = tensors.flat, tensors.views
        self._modules = [
            _dora_module(adaptable.modules[path], layer.scaling, self._views[3 * n : 3 * n + 3])
            for n, (path, layer) in enumerate(layers.items())
        ]
        self.slot_weights: Mapping[int, SlotWeights] = {
            adaptable.module_index[path]: SlotWeights(
                lora_a=own.lora_a, lora_b=own.scaled_b, scaling=own.scaling, dora_scale=own.excess
            )
            for path, own in zip(layers, self._modules, strict=True)
        }

    def refresh(self) -> None:
        """Make c B and c - 1 of the parameters as they are now."""
        for module in self._modules:
            module.refresh()

    def pass_gradients_on(self) -> None:
        """From c B and c - 1 to B and m."""
        for module in self._modules:
            module.pass_on()

    def write(self, folder: Path, end_tokens: tuple[int, ...]) -> None:
        copies = [view.detach().cpu().clone() for view in self._views]
        layers = {
            path: replace(layer, lora_a=copies[3 * n], lora_b=copies[3 * n + 1], magnitude=copies[3 * n + 2])
            for n, (path, layer) in enumerate(self._first.items())
        }
        write_adapter(Adapter(config=self._config, layers=layers, end_tokens=end_tokens), folder, overwrite=True)


def _dora_module(module: nn.Module, scaling: float, parameters: Sequence[nn.Parameter]) -> _DoraModule:
    lora_a, lora_b, magnitude = parameters
    squares = weight_matrix(module).detach().float().square().sum(1)
    return _DoraModule(
        module=module,
        scaling=scaling,
        base_squares=squares,
        lora_a=lora_a,
        lora_b=lora_b,
        magnitude=magnitude,
        scaled_b=lora_b.detach().clone().requires_grad_(),
        excess=torch.zeros_like(magnitude, requires_grad=True),
        norms=torch.ones_like(magnitude, requires_grad=False),
    )


def _first_magnitude(layer: LoraWeights, module: nn.Module) -> Tensor:  # [out]
    if layer.magnitude is not None:
        return layer.magnitude
    update = layer.scaling * layer.lora_b.float().t() @ layer.lora_a.float()
    weight = weight_matrix(module).detach().float()
    return torch.linalg.norm(weight + update.to(weight.device), dim=1)


def refresh_derived(states: Sequence[JobState]) -> None:
    """Bring up to date what the kernels see of parameters that they don't read themselves."""
    for state in states:
        if isinstance(state.parameters, TrainableDora):
            state.parameters.refresh()


def pass_gradients_on(states: Sequence[JobState]) -> None:
    """From what the kernels saw to the parameters."""
    for state in states:
        if isinstance(state.parameters, TrainableDora):
            state.parameters.pass_gradients_on()
