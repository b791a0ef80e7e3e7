"""Whether a formula gives what a module gives, for small and huge inputs."""

import logging
from collections.abc import Callable, Iterator
from math import inf

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

# How far the formula's result for a token may be from the module's, relative to its largest value.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
# Sizes of inputs: those behind a norm are near 1; a small one shows what is added, a large one what is clipped.
SCALES = (1e-3, 1.0, 1e2, 1e3)


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
