"""Factors as views of one flat tensor: one optimizer update, one norm, one reduction, one saved tensor."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from loraplex.adapters.store.slot_weights import SlotWeights
from loraplex.adapters.weights import LoraWeights
from loraplex.layers.attach import AdaptableModel
from loraplex.layers.base.modules import embed_scale


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


def factors_of(layers: Mapping[str, LoraWeights]) -> list[Tensor]:
    """A and B of every layer, one after the other."""
    return [factor for layer in layers.values() for factor in (layer.lora_a, layer.lora_b)]


def slot_weights(
    layers: Mapping[str, LoraWeights], factors: Sequence[Tensor], adaptable: AdaptableModel
) -> dict[int, SlotWeights]:
    """By module index, `factors` in the place of the layers' own; the LoRA scaling includes an embedding's scale."""
    weights = {}
    for number, (path, layer) in enumerate(layers.items()):
        lora_a, lora_b = factors[2 * number : 2 * number + 2]
        scale = embed_scale(adaptable.modules[path]) if layer.kind == "embedding" else 1.0
        own = SlotWeights(lora_a=lora_a, lora_b=lora_b, scaling=layer.scaling * scale)
        weights[adaptable.module_index[path]] = own
    return weights


def copied_layers(layers: Mapping[str, LoraWeights], factors: Sequence[Tensor]) -> dict[str, LoraWeights]:
    """The layers with a copy of `factors` as they are now."""
    copies = [factor.detach().cpu().clone() for factor in factors]
    return {
        path: LoraWeights(
            kind=layer.kind, lora_a=copies[2 * number], lora_b=copies[2 * number + 1], scaling=layer.scaling
        )
        for number, (path, layer) in enumerate(layers.items())
    }
