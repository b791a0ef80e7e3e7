"""A job's factors as views of one flat tensor: one optimizer update, one norm, one reduction, one saved tensor."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from loraplex.adapters.store.slot_weights import SlotWeights
from loraplex.adapters.weights import LoraWeights, ModuleShape
from loraplex.training.core.rng import Purpose, generator


def fresh_factors(module: ModuleShape, rank: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """PEFT's first weights: lora_a uniform (Kaiming, a = sqrt 5) and lora_b 0; for an embedding 0 and normal."""
    lora_a, lora_b = torch.zeros(rank, module.in_features), torch.zeros(rank, module.out_features)
    if module.kind == "embedding":
        return lora_a, lora_b.normal_(generator=draw)
    nn.init.kaiming_uniform_(lora_a, a=math.sqrt(5), generator=draw)
    return lora_a, lora_b


def fresh_weights(
    shapes: Mapping[str, ModuleShape], ranks: Mapping[str, int], scalings: Mapping[str, float], seed: int
) -> dict[str, LoraWeights]:
    """First weights for the modules in `ranks`, drawn from the seed in their order."""
    draw = generator(seed, Purpose.WEIGHTS)
    layers = {}
    for path, rank in ranks.items():
        lora_a, lora_b = fresh_factors(shapes[path], rank, draw)
        layers[path] = LoraWeights(kind=shapes[path].kind, lora_a=lora_a, lora_b=lora_b, scaling=scalings[path])
    return layers


class FlatTensors:
    """Tensors as float32 leaves that share memory with one flat parameter, as their gradients do with its gradient."""

    def __init__(self, tensors: Sequence[Tensor], device: torch.device) -> None:
        values = torch.cat([tensor.detach().to(device, torch.float32).reshape(-1) for tensor in tensors])
        self.flat = nn.Parameter(values)
        self.flat.grad = torch.zeros_like(self.flat)
        self.views: list[nn.Parameter] = []
        first = 0
        for tensor in tensors:
            stop = first + tensor.numel()
            view = nn.Parameter(self.flat.data[first:stop].view(tensor.shape))
            view.grad = self.flat.grad[first:stop].view(tensor.shape)
            self.views.append(view)
            first = stop


class FlatParameters:
    """float32 parameters by module path; `flat` and its gradient hold them all."""

    def __init__(self, layers: Mapping[str, LoraWeights], device: torch.device) -> None:
        self._layers = layers
        factors = [factor for weights in layers.values() for factor in (weights.lora_a, weights.lora_b)]
        tensors = FlatTensors(factors, device)
        self.flat, self._factors = tensors.flat, tensors.views

    @property
    def paths(self) -> list[str]:
        return list(self._layers)

    def slot_weights(
        self, module_index: Mapping[str, int], embed_scales: Mapping[str, float]
    ) -> dict[int, SlotWeights]:
        """The factors as the LoRA layers want them; the LoRA scaling includes an embedding's own scale."""
        weights = {}
        for number, (path, layer) in enumerate(self._layers.items()):
            lora_a, lora_b = self._factors[2 * number : 2 * number + 2]
            scaling = layer.scaling * embed_scales.get(path, 1.0)
            weights[module_index[path]] = SlotWeights(lora_a=lora_a, lora_b=lora_b, scaling=scaling)
        return weights

    def layers(self) -> dict[str, LoraWeights]:
        """A copy of the factors as they are now."""
        copies = {}
        for number, (path, layer) in enumerate(self._layers.items()):
            lora_a, lora_b = (f.detach().cpu().clone() for f in self._factors[2 * number : 2 * number + 2])
            copies[path] = LoraWeights(kind=layer.kind, lora_a=lora_a, lora_b=lora_b, scaling=layer.scaling)
        return copies
