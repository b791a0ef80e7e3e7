"""The registry of our attention functions, which stand before transformers' own for the modules of chosen models.

transformers' attention modules ask `AttentionInterface.get_interface` for the function that they call, in every pass.
While functions are installed on some model, that method gives out the same function behind a look at the module that
calls: one of such a model goes through them, outermost first; any other calls the function as it is. The names and
entries of transformers' registries stay as they are, because models do different things under different names.
"""

import itertools
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

AttentionOutput = tuple[Tensor, Tensor | None]  # [sequences, queries, heads, head_dim]; weights, if they are made

# Every term by which transformers' models change what their attention function computes, beside `scaling`, `is_causal`
# and the mask. A sliding window is no such term: the mask has it.
TERMS = frozenset({"block_indices", "cache", "dropout", "indices", "position_bias", "s_aux", "sinks", "softcap"})


class AttentionOwner(IntEnum):
    """Who installs functions, the innermost first: each calls what is further inside, at last the model's own."""

    FAST_DECODE = 0  # takes over transformers' sdpa function, which runs whatever isn't a step of fast decoding
    TRAINING = 1
    RESIDUALS = 2  # and captures and steering
    ENGINE = 3  # outside of residuals: packed passes serve theirs by themselves
    OBSERVER = 4


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionFunction:
    """A function of ours, and which of attention's terms it computes."""

    name: str  # of what needs it, in errors
    owner: AttentionOwner
    run: Callable[["AttentionCall"], AttentionOutput]
    terms: frozenset[str] = frozenset()  # which of TERMS
    instead: str = ""  # what to do without it: a sentence
    # (the mask function behind it, ...), for every model's masks: such a function isn't told whose pass it serves.
    mask: Callable[..., Any] | None = None

    def unknown_terms(self, options: Mapping[str, Any]) -> list[str]:
        """Which terms a call has that the function doesn't compute."""
        return sorted(
            term for term, value in options.items() if term in TERMS and term not in self.terms and _is_set(value)
        )

    def refusal(self, where: str, terms: Iterable[str]) -> str:
        """What an error says of unknown terms of the attention of `where`."""
        return f"{where} has the terms {list(terms)}, which {self.name} doesn't know. {self.instead}"


@dataclass(slots=True, eq=False)
class AttentionCall:
    """One call of the attention function, and what is behind the function that it has come to."""

    module: nn.Module
    query: Tensor  # [sequences, heads, queries, head_dim]
    key: Tensor  # [sequences, kv_heads, keys, head_dim]
    value: Tensor
    mask: Tensor | None  # [sequences or 1, heads or 1, queries, keys]
    options: dict[str, Any]
    own: Callable[..., AttentionOutput]  # the model's
    inner: tuple[AttentionFunction, ...]  # further inside, outermost first

    @property
    def scale(self) -> float:
        """What q k^T is multiplied by."""
        scaling = self.options.get("scaling")
        return float(self.query.shape[-1] ** -0.5 if scaling is None else scaling)

    @property
    def is_causal(self) -> bool:
        """Whether, without a mask, query t sees the keys up to t."""
        is_causal = self.options.get("is_causal")
        return bool(getattr(self.module, "is_causal", True) if is_causal is None else is_causal)

    def run_inner(self) -> AttentionOutput:
        """Compute it by what is behind."""
        if not self.inner:
            return self.own(self.module, self.query, self.key, self.value, self.mask, **self.options)
        call = AttentionCall(
            self.module, self.query, self.key, self.value, self.mask, self.options, self.own, self.inner[1:]
        )
        return self.inner[0].run(call)


class AttentionHandle:
    """One owner's use of a function on one model, until `remove` or the model's end.

    The function runs once however many owners have it, and leaves with the last one; others stay as they are.
    """

    def __init__(self, base: PreTrainedModel, function: AttentionFunction) -> None:
        modules = WeakSet(base.modules())
        with _lock:
            key = next(_keys)
            _installed[key] = (function, modules)
            _list_functions(modules)
            for patch in _PATCHES:
                patch.enter()
        self._end = weakref.finalize(base, _remove, key)
        self._end.atexit = False

    def remove(self) -> None:
        """End this use; a second time changes nothing."""
        self._end()


def attention_functions(module: nn.Module) -> tuple[AttentionFunction, ...]:
    """What is installed on a module's model, outermost first."""
    return _functions.get(module, ())


class _Lookup:
    """A model's attention function, behind what is installed on the module that calls."""

    def __init__(self, own: Callable[..., AttentionOutput]) -> None:
        self.__wrapped__ = own

    def __call__(self, *args: Any, **options: Any) -> AttentionOutput:
        functions = attention_functions(args[0] if args else options["module"])
        if not functions:
            return self.__wrapped__(*args, **options)
        return self._call(functions, *args, **options).run_inner()

    def _call(
        self,
        functions: tuple[AttentionFunction, ...],
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **options: Any,
    ) -> AttentionCall:
        return AttentionCall(module, query, key, value, attention_mask, options, self.__wrapped__, functions)


class _MaskLookup:
    """A mask function, behind all installed ones."""

    def __init__(self, own: Callable[..., Any]) -> None:
        self.__wrapped__ = own

    def __call__(self, *args: Any, **options: Any) -> Any:
        function = self.__wrapped__
        for installed in reversed(_outermost_first(installed for installed, _ in _installed.copy().values())):
            function = function if installed.mask is None else partial(installed.mask, function)
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
        """Put the former method back, unless somebody else has replaced ours: then it goes on, with nothing behind."""
        if vars(self._owner).get(self._name) is not self._ours or self._ours is None:
            return
        if self._own is None:
            delattr(self._owner, self._name)
        else:
            setattr(self._owner, self._name, self._own)
        self._own = self._ours = None


_lock = threading.RLock()
_keys = itertools.count()
_installed: dict[int, tuple[AttentionFunction, "WeakSet[nn.Module]"]] = {}  # by handle
_functions: "WeakKeyDictionary[nn.Module, tuple[AttentionFunction, ...]]" = WeakKeyDictionary()
_PATCHES = (
    _Patch(AttentionInterface, "get_interface", _Lookup),
    _Patch(AttentionMaskInterface, "__getitem__", _MaskLookup),
)


def _remove(key: int) -> None:
    with _lock:
        _, modules = _installed.pop(key)
        _list_functions(modules)
        if not _installed:
            for patch in _PATCHES:
                patch.leave()


def _list_functions(modules: Iterable[nn.Module]) -> None:
    """Write down what is installed on each of some modules."""
    installed = _installed.copy().values()
    for module in modules:
        found = _outermost_first(function for function, others in installed if module in others)
        if found:
            _functions[module] = found
        else:
            _functions.pop(module, None)


def _outermost_first(functions: Iterable[AttentionFunction]) -> tuple[AttentionFunction, ...]:
    return tuple(sorted(dict.fromkeys(functions), key=lambda function: function.owner, reverse=True))


def _is_set(term: Any) -> bool:
    return term is not None and (isinstance(term, Tensor) or bool(term))


def causal_mask(query: Tensor, key: Tensor) -> Tensor:  # [1, 1, queries, keys]  bool
    """What torch's `is_causal` means: query t sees the keys up to t (aligned at the first)."""
    queries = torch.arange(query.shape[2], device=query.device)
    keys = torch.arange(key.shape[2], device=query.device)
    return (queries.unsqueeze(1) >= keys).view(1, 1, query.shape[2], key.shape[2])
