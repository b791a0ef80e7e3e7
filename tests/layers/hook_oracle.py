"""Adapters on one row alone, by hooks that follow PEFT's formula: the oracle where PEFT can't run a model."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loraplex.adapters.weights import Adapter
from loraplex.layers.modules import embed_scale

Gate = Callable[[str, Tensor], float | Tensor]  # module, input -> the gate, or one for each token [.., 1]


class HookOracle:
    """A copy of a base model, one row at a time, without a cache."""

    def __init__(self, base: PreTrainedModel) -> None:
        self.base = copy.deepcopy(base)

    @contextmanager
    def adapted(self, adapters: Mapping[str, tuple[Adapter, Gate]]) -> Iterator[PreTrainedModel]:
        """The base model with y + gate * scaling * B A x at every module of every adapter."""
        handles = []
        for adapter, gate in adapters.values():
            for path, weights in adapter.layers.items():
                hook = _hook(path, weights, gate)
                handles.append(self.base.get_submodule(path).register_forward_hook(hook))
        try:
            yield self.base
        finally:
            for handle in handles:
                handle.remove()


def constant(weight: float) -> Gate:
    return lambda path, x: weight


def active_from(start: int) -> Gate:
    """An aLoRA of a row, or its beams, whose tokens are [beams, tokens], [tokens], or [.., tokens]."""

    def gate(path: str, x: Tensor) -> Tensor:
        return (torch.arange(x.shape[-2]) >= start).float().unsqueeze(-1)

    return gate


def _hook(path: str, weights: Any, gate: Gate) -> Any:
    def add(module: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
        x = args[0]
        if weights.kind == "embedding":
            hidden, scale = weights.lora_a.t()[x], weights.scaling * embed_scale(module)
        else:
            hidden, scale = x @ weights.lora_a.t(), weights.scaling
        return y + (hidden @ weights.lora_b) * scale * gate(path, x)

    return add
