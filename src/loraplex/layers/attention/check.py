"""Installing an attention function on a model, and seeing that the model goes through it and is what it was."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import Context, ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loraplex.errors import BaseModelError
from loraplex.layers.attention.interface import (
    TERMS,
    AttentionCall,
    AttentionFunction,
    AttentionHandle,
    AttentionOutput,
    AttentionOwner,
)

NUM_TOKENS = 8  # of the passes that look at a model: some more than the fewest for which attention differs
_NO_TERMS = ("position_ids", "cache_position")  # tensors that attention functions are given and don't compute with
_NUMBERS = (bool, int, float, Tensor)


class ModuleRun(NamedTuple):
    """One call of a module."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


@dataclass
class Watched:
    """What was seen of one pass, in order."""

    makes_masks: bool  # also where the model could do without
    runs: list[ModuleRun] = field(default_factory=list)
    calls: list[tuple[AttentionCall, Tensor]] = field(default_factory=list)  # and their outputs
    masks: list[tuple[Tensor | None, dict[str, Any]]] = field(default_factory=list)  # and what they were made by


def install_checked(base: PreTrainedModel, function: AttentionFunction) -> tuple[AttentionHandle, Watched]:
    """Put a function before a model's attention; also returns what the model was seen to do behind it.

    Raises BaseModelError, and everything is as before, for a model whose attention layers don't all go through
    transformers' attention interface, once each and with terms that the function computes, or whose own results the
    function would change.
    """
    before = run_plain(base)
    handle = AttentionHandle(base, function)
    try:
        with watching(base) as watched:
            after = run_plain(base)
        _check_calls(base, watched, function)
    except BaseException:
        handle.remove()
        raise
    if not _same(before, after):
        handle.remove()
        if _same(before, run_plain(base)):  # else its own results change from pass to pass: there is nothing to compare
            raise BaseModelError(
                f"{type(base).__name__} gives other results once a function of ours stands before its attention, which "
                f"{function.name} needs. {function.instead}"
            )
        handle = AttentionHandle(base, function)
    return handle, watched


def run_plain(base: PreTrainedModel, **inputs: Any) -> Tensor:
    """A few tokens through the model by itself, without what a call that runs now has made current; its logits.

    Raises BaseModelError if it can't be called with tokens and `inputs` alone.
    """
    vocab_size = base.config.get_text_config(decoder=True).vocab_size
    ids = torch.arange(NUM_TOKENS, device=base.device).add(1).remainder(vocab_size).unsqueeze(0)
    watched = _watched.get()

    def run() -> Tensor:
        _watched.set(watched)
        with torch.no_grad():
            output: Tensor = base(input_ids=ids, **{"use_cache": False, **inputs})[0]
        return output

    try:
        with _kept(base):
            return Context().run(run)
    except Exception as error:  # a model's code may fail in any way
        raise BaseModelError(
            f"{type(base).__name__} can't be run on {NUM_TOKENS} tokens: {type(error).__name__}: {error}. Check the "
            "model by itself: model(input_ids=...)."
        ) from error


@contextmanager
def watching(base: PreTrainedModel, *, makes_masks: bool = False) -> Iterator[Watched]:
    """Note what `run_plain` in the block runs, all its calls of the attention function, and the masks that it makes."""
    watched = Watched(makes_masks)
    handle = AttentionHandle(base, _OBSERVER)
    hooks = [module.register_forward_hook(_note_module, with_kwargs=True) for module in base.modules()]
    token = _watched.set(watched)
    try:
        yield watched
    finally:
        _watched.reset(token)
        for hook in hooks:
            hook.remove()
        handle.remove()


@contextmanager
def _kept(base: PreTrainedModel) -> Iterator[None]:
    """Put back the numbers and tensors that modules replace for the input that they see, as dynamic positions do."""
    tables = [table for module in base.modules() for table in (vars(module), vars(module)["_buffers"])]
    before = [{name: value for name, value in table.copy().items() if isinstance(value, _NUMBERS)} for table in tables]
    try:
        yield
    finally:
        for table, values in zip(tables, before, strict=True):
            table.update({name: value for name, value in values.items() if table.get(name) is not value})


def _check_calls(base: PreTrainedModel, watched: Watched, function: AttentionFunction) -> None:
    attending = {call.module for call, _ in watched.calls}
    classes = {type(module) for module in attending}
    ran = {run.module for run in watched.runs}
    past = {type(module).__name__ for module in ran - attending if type(module) in classes}
    if not attending or past:
        which = f"some layers of the class {sorted(past)} don't call" if past else "none of its layers calls"
        raise BaseModelError(
            f"{type(base).__name__} doesn't follow transformers' attention interface, which {function.name} needs: "
            f"{which} the attention function. {function.instead}"
        )
    seen: set[nn.Module] = set()
    for call, _ in watched.calls:
        where = attention_block(base, call.module)
        if call.module in seen:
            raise BaseModelError(
                f"{where} calls its attention function several times in a pass, which {function.name} doesn't know. "
                f"{function.instead}"
            )
        seen.add(call.module)
        unknown = function.unknown_terms(call.options)
        known = (*TERMS, *_NO_TERMS)
        unknown += [name for name, value in call.options.items() if isinstance(value, Tensor) and name not in known]
        if unknown:
            raise BaseModelError(function.refusal(where, unknown))


def attention_block(base: PreTrainedModel, module: nn.Module) -> str:
    """What errors call an attention module."""
    path = next(path for path, other in base.named_modules() if other is module)
    return f"{type(base).__name__}'s attention block {path!r}"


def _same(first: Tensor, second: Tensor) -> bool:
    equal = (first == second) | (first.isnan() & second.isnan()) if first.shape == second.shape else None
    return equal is not None and bool(equal.all())


_watched: ContextVar[Watched | None] = ContextVar("loraplex_watched", default=None)


def _observe(call: AttentionCall) -> AttentionOutput:
    output, weights = call.run_inner()
    watched = _watched.get()
    if watched is not None:
        watched.calls.append((call, output))
    return output, weights


def _observe_mask(former: Callable[..., Any], *args: Any, **options: Any) -> Any:
    watched = _watched.get()
    if watched is None or not watched.makes_masks:
        return former(*args, **options)
    mask = former(*args, **{**options, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})
    watched.masks.append((mask, options))
    return mask


_OBSERVER = AttentionFunction(name="a look", owner=AttentionOwner.OBSERVER, run=_observe, mask=_observe_mask)


def _note_module(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    watched = _watched.get()
    if watched is not None:
        watched.runs.append(ModuleRun(module, args, kwargs, output))
