"""One training example as a client sends it: tokens, the targets at each of them, and what the loss needs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loraplex.errors import RequestError
from loraplex.training.service.losses import ChosenLoss, check_inputs

MAX_TARGETS = 64  # target tokens at one position


@dataclass(frozen=True, eq=False, kw_only=True)
class Datum:
    """A row of a training pass. Position i of the tokens predicts targets[i]."""

    tokens: Sequence[int]
    targets: Tensor  # [tokens] or [tokens, k]  int64
    inputs: Mapping[str, Tensor]  # float32, each of the targets' shape


@dataclass(frozen=True, kw_only=True)
class DatumLimits:
    """What the base model and the server allow."""

    max_length: int  # tokens of a datum
    max_tokens: int  # of all datums of a request
    num_embeddings: int
    num_logits: int


def check_num_tokens(num_tokens: int, limits: DatumLimits) -> None:
    """Raise RequestError for more tokens than a request may have."""
    if num_tokens > limits.max_tokens:
        raise RequestError(
            f"the request has {num_tokens} tokens; {limits.max_tokens} are possible (max_request_tokens). Send several "
            "requests before the optimizer step: their gradients add up."
        )


def check_datums(datums: Sequence[Datum], loss: ChosenLoss, limits: DatumLimits) -> None:
    """Raise RequestError that names the datum, its fault and what is possible."""
    if not datums:
        raise RequestError("the request has no data. Send at least one datum.")
    check_num_tokens(sum(len(datum.tokens) for datum in datums), limits)
    for index, datum in enumerate(datums):
        _check_datum(datum, f"data[{index}]", loss, limits)


def _check_datum(datum: Datum, place: str, loss: ChosenLoss, limits: DatumLimits) -> None:
    length, targets = len(datum.tokens), datum.targets
    if not 1 <= length <= limits.max_length:
        raise RequestError(f"{place} has {length} tokens; 1 to {limits.max_length} are possible (max_datum_tokens).")
    _check_range(min(datum.tokens), max(datum.tokens), limits.num_embeddings, f"{place}: model_input")
    check_inputs(loss, set(datum.inputs), place)
    width = targets.shape[1] if targets.ndim == 2 else 1
    if targets.ndim not in (1, 2) or targets.shape[0] != length or not 1 <= width <= MAX_TARGETS:
        raise RequestError(
            f"{place}: target_tokens has shape {list(targets.shape)}; for {length} tokens it must be [{length}], or "
            f"[{length}, k] with k from 1 to {MAX_TARGETS}."
        )
    if targets.ndim == 2 and not loss.function.takes_many_targets:
        raise RequestError(f"{place}: target_tokens has shape {list(targets.shape)}, but {loss.name} takes [{length}].")
    _check_range(int(targets.min()), int(targets.max()), limits.num_logits, f"{place}: target_tokens")
    for name, tensor in datum.inputs.items():
        if tensor.shape != targets.shape:
            raise RequestError(
                f"{place}: {name} has shape {list(tensor.shape)}; it must be that of target_tokens, "
                f"{list(targets.shape)}."
            )
        if not bool(torch.isfinite(tensor).all()):
            raise RequestError(f"{place}: {name} has values that are not finite. Send finite numbers.")


def _check_range(least: int, largest: int, most: int, what: str) -> None:
    if least < 0 or largest >= most:
        wrong = least if least < 0 else largest
        raise RequestError(f"{what} has the token {wrong}; the base model knows 0 to {most - 1}.")
