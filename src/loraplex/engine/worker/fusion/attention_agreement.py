"""Whether a formula for attention asks for what a module asks for, wherever its tokens stand."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from loraplex.engine.worker.input_batch import InputBatch, current_input_batch
from loraplex.layers.fusion.agreement import agree, random_inputs

Forward = Callable[..., Any]


def attentions_agree(module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether `forward` asks for the same attention as a module that ran with these arguments, and ends it the same.

    The attention itself is replaced by random values: it is the same function, which would only blur small differences.
    """
    hidden = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(hidden, Tensor):
        return False
    for x in (hidden, *random_inputs(*hidden.shape, like=hidden)):
        given = ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})
        asked: list[list[Tensor]] = []
        made = []
        for run in (module.forward, lambda *a, **k: forward(module, *a, **k)):
            with _stand_in(x, asked):
                made.append(run(*given[0], **given[1])[0])
        if len(asked) != 2 or not agree(made[1], made[0]) or not all(map(agree, asked[1], asked[0])):
            return False
    return True


@contextmanager
def _stand_in(like: Tensor, asked: list[list[Tensor]]) -> Iterator[None]:
    """Note what attention is asked for in the current packed pass, and answer with random values of `like`'s size."""
    batch = current_input_batch()
    assert batch is not None, "a trial runs packed passes"

    def attend(batch: InputBatch, module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        asked.append([states.flatten(1) for states in (query, key, value)])
        shape = (*query.shape[:2], value.shape[-1])
        generator = torch.Generator().manual_seed(1)
        return (torch.randn(shape, generator=generator) * like.abs().max().item()).to(value)

    batch.stand_in = attend
    try:
        yield
    finally:
        batch.stand_in = None
