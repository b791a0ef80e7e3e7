"""A linked residual's weights as views of one flat tensor, as a LoRA's are (parameters.py)."""

from collections.abc import Mapping, Sequence

import torch

from loraplex.residual.modules import BaseFingerprint, LinkedLayer, LinkedResidual, ResidualConfig, fresh_linked_layer
from loraplex.training.core.parameters import FlatTensors
from loraplex.training.core.rng import Purpose, generator


def fresh_residual(
    config: ResidualConfig, identity: BaseFingerprint, layers: Sequence[int], seed: int
) -> LinkedResidual:
    """First weights for `layers`, drawn from the seed in their order."""
    draw = generator(seed, Purpose.WEIGHTS)
    weights = {
        layer: fresh_linked_layer(identity.hidden_size, identity.num_heads[layer], config.r, draw) for layer in layers
    }
    return LinkedResidual(config=config, layers=weights, base=identity)


class ResidualParameters:
    """float32 parameters by layer; `flat` and its gradient hold them all."""

    paths: Sequence[str] = ()  # of adapted modules: none

    def __init__(self, residual: LinkedResidual, device: torch.device) -> None:
        self._first = residual
        factors = [f for weights in residual.layers.values() for f in (weights.a, weights.b, weights.head_logits)]
        tensors = FlatTensors(factors, device)
        self.flat, self._factors = tensors.flat, tensors.views

    def residual(self) -> LinkedResidual:
        """The residual whose weights are the parameters: what trains."""
        return self._made_of(self._factors)

    def trained(self) -> LinkedResidual:
        """A copy of the residual as it is now."""
        return self._made_of([factor.detach().cpu().clone() for factor in self._factors])

    def _made_of(self, factors: Sequence[torch.Tensor]) -> LinkedResidual:
        layers: Mapping[int, LinkedLayer] = {
            layer: LinkedLayer(a=factors[3 * n], b=factors[3 * n + 1], head_logits=factors[3 * n + 2])
            for n, layer in enumerate(self._first.layers)
        }
        return LinkedResidual(config=self._first.config, layers=layers, base=self._first.base)
