"""Gradient checkpointing (arXiv 1604.06174): layers keep what they are given, and run again in the backward pass.

Without it, a layer keeps what each of its modules was given until the gradients have passed it. transformers' own
checkpointing runs in training mode only, in which base models would drop what they are given.
"""

import contextvars
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from loraplex.errors import ConfigError


def checkpointable_layers(base: nn.Module) -> list[nn.Module]:
    """The layers that transformers would checkpoint. Raises ConfigError for a model without any."""
    layers: list[nn.Module] = [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError(
            f"gradient_checkpointing is True, but {type(base).__name__} has no layers that can run again in the "
            "backward pass. Leave it out, and lower tokens_per_forward."
        )
    return layers


@contextmanager
def checkpointed(layers: Sequence[nn.Module], generators: Sequence[torch.Generator]) -> Iterator[None]:
    """Let layers run again in the backward pass of what runs inside; the draws of `generators` are the same then."""
    for layer in layers:
        vars(layer)["forward"] = _checkpointed(layer.forward, generators)
    try:
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _checkpointed(forward: Callable[..., Any], generators: Sequence[torch.Generator]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        again = _Again(forward, generators)
        return checkpoint(again, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return run


class _Again:
    """One call of a layer, and the same once more: under the routing and with the draws of the first."""

    def __init__(self, forward: Callable[..., Any], generators: Sequence[torch.Generator]) -> None:
        self._forward, self._generators = forward, generators
        self._context = contextvars.copy_context()
        self._states = [generator.get_state() for generator in generators]
        self._has_run = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._has_run:
            self._has_run = True
            return self._forward(*args, **kwargs)
        now = [generator.get_state() for generator in self._generators]
        self._set(self._states)
        try:
            return self._context.run(self._forward, *args, **kwargs)
        finally:
            self._set(now)

    def _set(self, states: Sequence[torch.Tensor]) -> None:
        for generator, state in zip(self._generators, states, strict=True):
            generator.set_state(state)
