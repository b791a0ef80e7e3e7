"""What a linear router begins with."""

import torch
from torch import Tensor

from loraplex.adapters.store.slot_weights import SlotWeights
from loraplex.errors import ConfigError
from loraplex.routers.router import LinearRouter, gram_of, strongest_direction
from loraplex.training.core.rng import Purpose, generator
from loraplex.training.mixture.routing import Experts
from loraplex.training.routers.config import FirstWeights

NOISE = 0.1  # of the logits for an input whose features have variance 1


@torch.no_grad()
def set_first_weights(router: LinearRouter, kind: FirstWeights, experts: Experts, seed: int) -> None:
    """Give a router its first weights; "kept" leaves them.

    "noise": normal, mean 0, deviation NOISE / sqrt(in). "arrow": the first right singular vector v of each expert's
    B A, whose |x . v| Arrow scores. "spectr": sigma v, sigma its singular value: |sigma x . v| is the best score of
    rank 1 for SpectR's |B A x|. A direction has no sign, a logit has: v's largest entry is made positive. Biases are 0.
    Raises ConfigError for directions in a router that layers share.
    """
    if kind == "kept":
        return
    if kind == "noise":
        draw = generator(seed, Purpose.WEIGHTS)
        for weight in router.weights:
            weight.copy_(torch.randn(weight.shape, generator=draw) * (NOISE / weight.shape[1] ** 0.5))
    else:
        _set_directions(router, experts, seed, scaled=kind == "spectr")
    for bias in router.biases:
        bias.zero_()


def _set_directions(router: LinearRouter, experts: Experts, seed: int, *, scaled: bool) -> None:
    if router.config.shared:
        raise ConfigError(
            "first_weights are the experts' directions, which each LoRA layer has of its own, but the router is "
            "shared. Set first_weights to 'noise', or shared to False."
        )
    for module, place in router.place.items():
        rows = [_direction(layers.get(module), router.widths[module], seed, scaled=scaled) for layers in experts.slots]
        router.weights[place].copy_(torch.stack(rows))


def _direction(expert: SlotWeights | None, width: int, seed: int, *, scaled: bool) -> Tensor:  # [in]
    if expert is None:
        return torch.zeros(width)
    v = strongest_direction(expert, seed)[0]
    v = v * torch.sign(v[v.abs().argmax()])
    if not scaled:
        return v
    u = expert.lora_a.float() @ v
    return v * (u @ gram_of(expert) @ u).clamp_min(0).sqrt()
