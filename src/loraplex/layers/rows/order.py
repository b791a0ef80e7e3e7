"""In which order a module sees the tokens of several rows: told from what it sees of each row alone."""

from collections.abc import Sequence
from enum import Enum

import torch
from torch import Tensor

_SAME = 0.1  # of the usual distance of two tokens: so near are a token's inputs alone and in a batch
_LEAST_SAME = 0.75  # of the tokens: a router may send a token elsewhere for a last bit


class RowOrder(Enum):
    """Of the tokens that reach a module."""

    ROWS = "row after row: [rows, tokens, features], or flattened with equal shares"
    TOKENS = "token after token: [tokens, rows, features]"
    UNKNOWN = "no order that a layout tells"


def find_order(alone: Sequence[Sequence[Tensor]], together: Sequence[Tensor]) -> RowOrder:
    """The order that explains what a module saw of all rows together, given what it saw of each row alone.

    One tensor [..., features] for each call of the module: `alone` of each row's pass, `together` of the batch's.
    """
    if not together or any(len(calls) != len(together) for calls in alone):
        return RowOrder.UNKNOWN
    for order in (RowOrder.ROWS, RowOrder.TOKENS):
        if all(_explains(order, [calls[call] for calls in alone], together[call]) for call in range(len(together))):
            return order
    return RowOrder.UNKNOWN


def _explains(order: RowOrder, alone: Sequence[Tensor], together: Tensor) -> bool:
    if order is RowOrder.TOKENS:
        if together.ndim != 3 or any(part.ndim != 3 for part in alone):
            return False
        alone, together = [part.transpose(0, 1) for part in alone], together.transpose(0, 1)
    first = alone[0].shape
    if any(part.shape != first for part in alone) or together.ndim != len(first) or len(first) < 2:
        return False
    if together.shape != (first[0] * len(alone), *first[1:]):
        return False
    return _same_tokens(torch.cat([part.flatten(0, -2) for part in alone]), together.flatten(0, -2))


def _same_tokens(expected: Tensor, seen: Tensor) -> bool:  # [tokens, features]
    """Whether each token is what is expected in its place, rather than another one."""
    mode = "donot_use_mm_for_euclid_dist"  # which is exact where tokens are close to each other
    distances = torch.cdist(seen, expected, compute_mode=mode)
    usual = torch.cdist(expected, expected, compute_mode=mode).median()
    in_place = distances.diagonal()
    same = (in_place <= distances.amin(dim=1)) | (in_place <= _SAME * usual)
    return bool(same.float().mean() >= _LEAST_SAME)
