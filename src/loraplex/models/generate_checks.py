"""What a base model must be able to do before `generate` runs rows of different adapters on it."""

from contextvars import Context
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from loraplex.errors import BaseModelError, RequestError

_NUM_TOKENS, _NUM_NEW = 6, 3
_TOLERANCE = 0.05  # of the logits' range: rounding in 16 bits stays below, states of other rows don't
_keeps_rows_apart: "WeakKeyDictionary[PreTrainedModel, bool]" = WeakKeyDictionary()


def check_generates(base: PreTrainedModel, num_rows: int, *, use_cache: bool) -> None:
    """Raise BaseModelError for a model without `generate`, RequestError where rows change each other's tokens there."""
    name = type(base).__name__
    if not base.can_generate():
        raise BaseModelError(f"{name} can't generate text. Use forward, or load a causal language model.")
    if use_cache and num_rows > 1 and not _uses_caches(base) and not keeps_rows_apart(base):
        raise RequestError(
            f"{name} keeps a state of its own instead of transformers' cache, and gives a row other tokens beside "
            "others than alone. Pass use_cache=False, or generate one row at a time."
        )


def _uses_caches(base: Any) -> bool:
    return bool(base._supports_default_dynamic_cache())


def keeps_rows_apart(base: PreTrainedModel) -> bool:
    """Whether two rows' answers are those that they get alone; tried once, on a few tokens."""
    if base not in _keeps_rows_apart:
        size = int(getattr(base.get_input_embeddings(), "num_embeddings", 2))
        ids = torch.arange(1, 1 + 2 * _NUM_TOKENS, device=base.device).remainder(size).view(2, -1)
        together, *alone = (Context().run(_logits, base, rows) for rows in (ids, ids[:1], ids[1:]))
        _keeps_rows_apart[base] = all(_is_near(together[:, row], own[:, 0]) for row, own in enumerate(alone))
    return _keeps_rows_apart[base]


def _logits(base: Any, ids: Tensor) -> Tensor:  # [new tokens, rows, vocab]
    """Each answer goes on with the same tokens, whatever the logits say."""
    out = base.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=_NUM_NEW,
        min_new_tokens=_NUM_NEW,
        do_sample=False,
        num_beams=1,
        output_logits=True,
        return_dict_in_generate=True,
        logits_processor=[_Forced()],
    )
    return torch.stack(out.logits)


class _Forced:
    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        forced = torch.full_like(scores, float("-inf"))
        forced[:, 1] = 0
        return forced


def _is_near(one: Tensor, other: Tensor) -> bool:
    span = other.max() - other.min()
    return bool((one - other).abs().max() <= _TOLERANCE * span)
