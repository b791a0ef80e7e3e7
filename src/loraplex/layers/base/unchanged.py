"""Running a model as if it had not run: random numbers, modes, and what its modules keep are as before."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_TABLES = ("_modules", "_parameters", "_buffers")


@contextmanager
def left_unchanged(model: nn.Module) -> Iterator[None]:
    """Give each module back what the block replaced: some models change themselves for the input that they see."""
    before = {module: _state(module) for module in model.modules()}
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        for module, (attributes, tables) in before.items():
            _give_back(vars(module), attributes)
            for name, table in tables.items():
                _give_back(vars(module)[name], table)


def _state(module: nn.Module) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    return dict(vars(module)), {name: dict(vars(module)[name]) for name in _TABLES}


def _give_back(now: dict[str, Any], before: dict[str, Any]) -> None:
    for name in now.keys() - before.keys():
        del now[name]
    for name, value in before.items():
        if now.get(name, before) is not value:
            now[name] = value
