"""Functions of ours in front of transformers' attention, for the modules of chosen models only.

transformers' attention modules ask `AttentionInterface.get_interface` for the function that they call, in every pass.
While some model has fronts, that method gives out the same function behind a look at the module that calls: one of a
model with fronts goes through them, outermost first; any other calls the function as it is. The names and entries of
transformers' registries stay as they are, because models do different things under different names.
"""

import itertools
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

AttentionOutput = tuple[Tensor, Tensor | None]
AttentionFunction = Callable[..., AttentionOutput]

# Every term by which transformers' models change what their attention function computes, beside `scaling`, `is_causal`
# and the mask. A sliding window is no such term: the mask has it.
TERMS = frozenset({"block_indices", "cache", "dropout", "indices", "position_bias", "s_aux", "sinks", "softcap"})


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionFront:
    """A function that stands in front of attention functions."""

    place: int  # a higher one stands further outside
    # (what is behind it, module, query, key, value, attention_mask, **options): named as the interface names them
    attend: Callable[..., AttentionOutput]
    computes: frozenset[str] = frozenset()  # which of TERMS
    # (the mask function behind it, ...), for every model's masks: such a function isn't told whose pass it serves.
    mask: Callable[..., Any] | None = None

    def unknown_terms(self, options: Mapping[str, Any]) -> list[str]:
        """Which terms a call has that the front doesn't compute."""
        return sorted(term for term in TERMS - self.computes if _is_set(options.get(term)))


class Behind:
    """What is behind a front, as an attention function: the fronts further inside, and the model's own function."""

    def __init__(self, fronts: tuple[AttentionFront, ...], own: AttentionFunction) -> None:
        self.own = own
        self._fronts = fronts

    def __call__(self, *args: Any, **options: Any) -> AttentionOutput:
        if not self._fronts:
            return self.own(*args, **options)
        return self._fronts[0].attend(Behind(self._fronts[1:], self.own), *args, **options)


class FrontHandle:
    """One front of one model, until `remove` or the model's end; other fronts stay as they are."""

    def __init__(self, base: PreTrainedModel, front: AttentionFront) -> None:
        self.front = front
        self._modules = weakref.WeakSet(base.modules())
        with _lock:
            for module in self._modules:
                _fronts[module] = _outermost_first((*fronts_of(module), front))
            key = next(_keys)
            _in_use[key] = front
            for patch in _PATCHES:
                patch.enter()
        self._end = weakref.finalize(base, _end, key)
        self._end.atexit = False

    def remove(self) -> None:
        """Take the front away; a second time changes nothing."""
        with _lock:
            if not self._end.alive:
                return
            for module in self._modules:
                left = list(fronts_of(module))
                left.remove(self.front)
                if left:
                    _fronts[module] = tuple(left)
                else:
                    del _fronts[module]
            self._end()


def fronts_of(module: nn.Module) -> tuple[AttentionFront, ...]:
    """The fronts of a module, outermost first, each as often as it was added."""
    return _fronts.get(module, ())


class _Fronted:
    """An attention function, behind the fronts of the module that calls."""

    def __init__(self, function: AttentionFunction) -> None:
        self.__wrapped__ = function

    def __call__(self, *args: Any, **options: Any) -> AttentionOutput:
        fronts = fronts_of(args[0] if args else options["module"])
        return Behind(tuple(dict.fromkeys(fronts)), self.__wrapped__)(*args, **options)


class _FrontedMask:
    """A mask function, behind all fronts that have one."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.__wrapped__ = function

    def __call__(self, *args: Any, **options: Any) -> Any:
        function = self.__wrapped__
        for front in reversed(_outermost_first(dict.fromkeys(_in_use.copy().values()))):
            function = function if front.mask is None else partial(front.mask, function)
        return function(*args, **options)


class _Patch:
    """A method of a class, replaced for a while."""

    def __init__(self, owner: type, name: str, wrapper: type) -> None:
        self._owner, self._name, self._wrapper = owner, name, wrapper
        self._own: Any = None  # what the class itself had under the name
        self._ours: Any = None

    def enter(self) -> None:
        if self._ours is not None and getattr(self._owner, self._name) is self._ours:
            return
        former, wrapper = getattr(self._owner, self._name), self._wrapper

        def look_up(registry: Any, *args: Any, **options: Any) -> Any:
            found = former(registry, *args, **options)
            return found if isinstance(found, wrapper) else wrapper(found)

        self._own, self._ours = vars(self._owner).get(self._name), look_up
        setattr(self._owner, self._name, look_up)

    def leave(self) -> None:
        """Put the former method back, unless somebody else has replaced ours: then it goes on, and has no fronts."""
        if vars(self._owner).get(self._name) is not self._ours or self._ours is None:
            return
        if self._own is None:
            delattr(self._owner, self._name)
        else:
            setattr(self._owner, self._name, self._own)
        self._own = self._ours = None


_lock = threading.RLock()
_fronts: "WeakKeyDictionary[nn.Module, tuple[AttentionFront, ...]]" = WeakKeyDictionary()
_in_use: dict[int, AttentionFront] = {}  # by handle
_keys = itertools.count()
_PATCHES = (
    _Patch(AttentionInterface, "get_interface", _Fronted),
    _Patch(AttentionMaskInterface, "__getitem__", _FrontedMask),
)


def _end(key: int) -> None:
    with _lock:
        del _in_use[key]
        if not _in_use:
            for patch in _PATCHES:
                patch.leave()


def _outermost_first(fronts: Iterable[AttentionFront]) -> tuple[AttentionFront, ...]:
    return tuple(sorted(fronts, key=lambda front: front.place, reverse=True))


def _is_set(term: Any) -> bool:
    return term is not None and (isinstance(term, Tensor) or bool(term))


def causal_mask(query: Tensor, key: Tensor) -> Tensor:  # [1, 1, queries, keys]  bool
    """What torch's `is_causal` means: query t sees the keys up to t (aligned at the first)."""
    queries = torch.arange(query.shape[2], device=query.device)
    keys = torch.arange(key.shape[2], device=query.device)
    return (queries.unsqueeze(1) >= keys).view(1, 1, query.shape[2], key.shape[2])
