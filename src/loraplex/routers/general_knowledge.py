"""General knowledge subtraction (arXiv 2505.10939): experts without what general adapters have in common."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from loraplex.adapters.weights import Adapter, LoraWeights
from loraplex.errors import MixtureError
from loraplex.validation import listed


def without_general(experts: Mapping[str, Adapter], general: Mapping[str, Adapter]) -> dict[str, Adapter]:
    """Each expert with the mean of the general adapters' A subtracted from its A, and that of their B from its B.

    As PEFT does it: all have to have the same modules and ranks. Raises MixtureError where they don't.
    """
    means = {path: _mean([adapter.layers.get(path) for adapter in general.values()]) for path in _paths(general)}
    return {name: _less(name, adapter, means) for name, adapter in experts.items()}


def _paths(adapters: Mapping[str, Adapter]) -> list[str]:
    return list(next(iter(adapters.values())).layers)


def _mean(weights: Sequence[LoraWeights | None]) -> tuple[Tensor, Tensor] | None:
    """The means of A [rank, in] and B [rank, out]; None where ranks or modules differ."""
    found = [each for each in weights if each is not None]
    if len(found) < len(weights) or len({each.rank for each in found}) > 1:
        return None
    return (
        torch.stack([each.lora_a.float() for each in found]).mean(dim=0),
        torch.stack([each.lora_b.float() for each in found]).mean(dim=0),
    )


def _less(name: str, adapter: Adapter, means: Mapping[str, tuple[Tensor, Tensor] | None]) -> Adapter:
    other = sorted(adapter.layers.keys() ^ means.keys())
    if other:
        raise MixtureError(
            f"expert {name!r} and the general experts adapt different modules: {listed(other)}. Their factors can be "
            "subtracted only where all adapt the same ones."
        )
    layers = {}
    for path, weights in adapter.layers.items():
        mean = means[path]
        if mean is None or mean[0].shape != weights.lora_a.shape:
            raise MixtureError(
                f"expert {name!r} and the general experts have different ranks in {path!r}. Their factors can be "
                "subtracted only where all have the same."
            )
        layers[path] = replace(
            weights, lora_a=weights.lora_a.float() - mean[0], lora_b=weights.lora_b.float() - mean[1]
        )
    return Adapter(config=adapter.config, layers=layers, end_tokens=adapter.end_tokens)
