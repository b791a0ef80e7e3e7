"""Which way a decoding step of a variant goes: its layers in one call, their attention in one, or module by module."""

from collections.abc import Sequence

import torch
from torch import nn

from loraplex import MultiLoraModel
from loraplex.engine.config import EngineConfig
from loraplex.engine.engine import Engine
from loraplex.engine.worker.cpu_fusion import stack_of
from loraplex.errors import LoraplexError
from tests.architectures.variants import W, make_model

ONE_CALL, ATTENTION, MODULES = "one call", "attention half", "module by module"


def decode_path(name: str, dtype: torch.dtype = torch.float32) -> str:
    """The way of a variant's layers; of several, each with its number of layers. "-": the engine refuses it."""
    base = make_model(name).to(dtype)
    try:
        with Engine(MultiLoraModel(base), EngineConfig(cache_bytes=2**22, max_length=4 * W)):
            ways = [_way(layer) for layer in _layers(base)]
    except LoraplexError:
        return "-"
    kinds = list(dict.fromkeys(ways))
    return kinds[0] if len(kinds) == 1 else ", ".join(f"{way} ({ways.count(way)})" for way in kinds)


def _way(layer: nn.Module) -> str:
    if stack_of(layer) is not None:
        return ONE_CALL
    return ATTENTION if any(stack_of(part) is not None for part in layer.modules()) else MODULES


def _layers(base: nn.Module) -> Sequence[nn.Module]:
    """The longest list of layers."""
    lists = [module for module in base.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=lambda one: sum(1 for _ in one.modules()), default=[base])
