"""Our attention functions in front of a base model's own, through transformers' public attention interface.

Several may stand in front of one base model at once and leave in any order: the model's implementation is always named
after those that are there, the outermost first.
"""

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from loraplex.errors import BaseModelError

AttentionOutput = tuple[Tensor, Tensor | None]
AttentionFunction = Callable[..., AttentionOutput]


@dataclass(frozen=True, kw_only=True)
class AttentionFront:
    """An attention function that stands in front of others."""

    prefix: str  # of the implementation's name; no other front's name begins with it and goes on with that front's
    place: int  # a higher one stands further outside
    attend: AttentionFunction  # is given the name of the implementation behind it, and then what such a function is
    mask: Callable[..., Any] | None = None  # the same for the mask function, given the function behind it; None: that


_lock = threading.RLock()
_joined: "WeakKeyDictionary[PreTrainedModel, list[AttentionFront]]" = WeakKeyDictionary()


def join_front(base: PreTrainedModel, front: AttentionFront) -> bool:
    """Put a front before a model's attention; False, and nothing has changed, for a model that doesn't follow."""
    with _lock:
        fronts = [*_joined.get(base, ()), front]
        if _set(base, own_implementation(base), fronts):
            _joined[base] = fronts
            return True
        _set(base, own_implementation(base), fronts[:-1])
        return False


def leave_front(base: PreTrainedModel, front: AttentionFront) -> None:
    """Take one of the fronts away, as often as it was joined; the others stay."""
    with _lock:
        own, fronts = own_implementation(base), list(_joined[base])
        fronts.remove(front)
        _joined[base] = fronts
        _set(base, own, fronts)


def own_implementation(base: PreTrainedModel) -> str:
    """The name of the attention implementation behind all fronts."""
    name = str(base.config._attn_implementation)
    for front in _outermost_first(_joined.get(base, ())):
        name = name.removeprefix(front.prefix)
    return name


def set_own_implementation(base: PreTrainedModel, own: str) -> None:
    """Change the implementation behind the fronts."""
    with _lock:
        _set(base, own, _joined.get(base, []))


def function_behind(name: str, module: nn.Module) -> AttentionFunction:
    """The attention function of that name for a module. Raises BaseModelError."""
    if name != "eager":
        return ALL_ATTENTION_FUNCTIONS[name]
    # Eager attention is not registered: each architecture has its own, beside its attention class.
    function = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if function is None:
        raise BaseModelError(
            f"{type(module).__name__} has no eager attention function of the usual name. Load the base model with "
            "attn_implementation='sdpa'."
        )
    return function


def _set(base: PreTrainedModel, own: str, fronts: list[AttentionFront]) -> bool:
    """Name the model's implementation after its fronts; returns whether it took the name."""
    name = own
    for front in reversed(_outermost_first(fronts)):
        former, name = name, front.prefix + name
        if name not in ALL_ATTENTION_FUNCTIONS:
            _register(front, former, name)
    if base.config._attn_implementation != name:
        base.set_attn_implementation(name)
    return bool(base.config._attn_implementation == name)


def _register(front: AttentionFront, former: str, name: str) -> None:
    if former in ALL_MASK_ATTENTION_FUNCTIONS:
        mask = ALL_MASK_ATTENTION_FUNCTIONS[former]
        AttentionMaskInterface.register(name, mask if front.mask is None else partial(front.mask, mask))
    AttentionInterface.register(name, partial(front.attend, former))


def _outermost_first(fronts: "list[AttentionFront] | tuple[AttentionFront, ...]") -> list[AttentionFront]:
    return sorted(set(fronts), key=lambda front: front.place, reverse=True)
