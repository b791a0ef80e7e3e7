"""Rotary positions that depend on a sequence's length, told for every row of a batch as for the row alone.

transformers' dynamic NTK and longrope choose their frequencies by the largest position of a whole batch, and dynamic
NTK goes on with those of the longest sequence that it has seen. So a short row beside a long one, or after one, would
get other positions than alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

_active: ContextVar[bool] = ContextVar("loraplex_row_positions", default=False)

Call = tuple[tuple[Any, ...], dict[str, Any]]


def join_positions(base: nn.Module) -> list[RemovableHandle]:
    """Let the modules whose positions depend on a length tell them row by row inside `use_row_positions`."""
    handles: list[RemovableHandle] = []
    for module in base.modules():
        if depends_on_length(module):
            handles.append(module.register_forward_hook(_of_rows, with_kwargs=True))
    return handles


@contextmanager
def use_row_positions() -> Iterator[None]:
    """Inside the block every row of a batch has the positions that it has alone."""
    token = _active.set(True)
    try:
        yield
    finally:
        _active.reset(token)


def depends_on_length(module: nn.Module) -> bool:
    """Whether a module is one that transformers' `dynamic_rope_update` gives other frequencies for longer sequences."""
    types = getattr(module, "rope_type", None)
    return any(
        isinstance(rope, str) and ("dynamic" in rope or rope == "longrope")
        for rope in (types.values() if isinstance(types, dict) else (types,))
    )


def changes_with_every_token(base: nn.Module) -> bool:
    """Whether positions go on changing as a sequence grows, so that cached keys are not those of a whole pass."""
    return any(depends_on_length(module) and "dynamic" in str(module.rope_type) for module in base.modules())


def _of_rows(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """The output with each row as it is alone: [rows, tokens, dim], or several of them."""
    positions = kwargs["position_ids"] if "position_ids" in kwargs else args[1]  # [rows or 1, tokens]
    if not _active.get() or positions.ndim != 2:
        return None
    lengths = positions.amax(dim=1)
    parts, order = [], []
    for length in lengths.unique():
        rows = (lengths == length).nonzero().squeeze(1)
        # A short sequence lets dynamic NTK forget the longest one.
        for told in (torch.zeros_like(positions[:1, :1]), positions[rows]):
            own_args, own_kwargs = _with_positions((args, kwargs), told)
            part = type(module).forward(module, *own_args, **own_kwargs)
        parts.append(part)
        order.append(rows)
    if isinstance(output, Tensor):
        return _in_order(parts, order)
    return tuple(_in_order(part, order) for part in zip(*parts, strict=True))


def _with_positions(call: Call, positions: Tensor) -> Call:
    args, kwargs = call
    if "position_ids" in kwargs:
        return args, {**kwargs, "position_ids": positions}
    return (args[0], positions, *args[2:]), kwargs


def _in_order(parts: Any, order: list[Tensor]) -> Tensor:
    joined = torch.cat(list(parts))
    return torch.empty_like(joined).index_copy_(0, torch.cat(order), joined)
