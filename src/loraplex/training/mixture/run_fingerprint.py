"""What a mixture's checkpoint belongs to."""

import hashlib
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from loraplex.training.core.run_fingerprint import base_fingerprint
from loraplex.training.mixture.state import MixtureState


def mixture_fingerprint(state: MixtureState, base: PreTrainedModel) -> dict[str, Any]:
    """Everything that decides what a run learns, in JSON's types. Call it before the first step."""
    factors = (
        factor
        for layers in state.experts.slots
        for index in sorted(layers)
        for factor in (layers[index].lora_a, layers[index].lora_b)
    )
    return {
        "base model": base_fingerprint(base),
        "mixture": {
            "name": state.name,
            "experts": list(state.mixture.experts),
            "weights of the experts": _digest(factors),
            "config": asdict(state.mixture.config),
            "first weights of the scaling head": _digest(state.mixture.head.state_dict().values()),
        },
        "training": state.config.identity(),
        "data": {
            "names": list(state.data.names),
            "content": state.data.digest,
            "records in an epoch": list(state.data.per_epoch),
            "num_steps": state.data.num_steps,
        },
    }


def _digest(tensors: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(str(tuple(tensor.shape)).encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
