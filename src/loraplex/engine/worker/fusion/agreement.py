"""Whether a formula gives what a module gives: for small and huge inputs, and wherever its tokens stand."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

from loraplex.engine.worker.input_batch import InputBatch, current_input_batch

logger = logging.getLogger(__name__)

# How far the formula's result for a token may be from the module's, relative to its largest value.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
# Sizes of inputs: those behind a norm are near 1; a small one shows what is added, a large one what is clipped.
SCALES = (1e-3, 1.0, 1e2, 1e3)

Forward = Callable[..., Any]


def agree(ours: object, theirs: object) -> bool:
    """Whether two results [.., dim] of a pass are the same for every token, up to rounding."""
    if not isinstance(theirs, Tensor):
        return False
    return distance(ours, theirs) <= TOLERANCE.get(theirs.dtype, 0.0)


def distance(ours: object, theirs: object) -> float:
    """How far two results [.., dim] are apart at most, relative to a token's largest value; infinite or NaN if they
    can't be compared."""
    if not isinstance(ours, Tensor) or not isinstance(theirs, Tensor) or ours.shape != theirs.shape:
        return inf
    if ours.dtype != theirs.dtype or theirs.dtype not in TOLERANCE:
        return inf
    apart = (ours.float() - theirs.float()).abs().amax(dim=-1)
    size = theirs.float().abs().amax(dim=-1)
    return (apart / size).masked_fill(apart == 0, 0.0).max().item()


def holds(agrees: Callable[[], bool]) -> bool:
    """The result of a comparison; False where it can't be made, as a module takes other arguments or shapes."""
    try:
        return agrees()
    except Exception as error:
        logger.debug("a module is not taken over: %s: %s", type(error).__name__, error)
        return False


def random_inputs(*shape: int, like: Tensor) -> Iterator[Tensor]:
    """Random tensors of every size."""
    generator = torch.Generator().manual_seed(0)
    for scale in SCALES:
        yield (torch.randn(shape, generator=generator) * scale).to(like)


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
