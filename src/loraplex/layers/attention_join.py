"""Putting a front before a model's attention, and seeing that the model goes through it and is what it was."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import Context, ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loraplex.errors import BaseModelError
from loraplex.layers.attention_interface import AttentionFront, AttentionOutput, Behind, FrontHandle

NUM_TOKENS = 8  # of the passes that look at a model: some more than the fewest for which attention differs
_NUMBERS = (bool, int, float, Tensor)


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionCall:
    """One call of an attention function."""

    module: nn.Module
    query: Tensor  # [sequences, heads, queries, head_dim]
    key: Tensor  # [sequences, kv_heads, keys, head_dim]
    value: Tensor
    mask: Tensor | None
    options: dict[str, Any]
    output: Tensor  # [sequences, queries, heads, head_dim]


@dataclass
class Watched:
    """What was seen of one pass."""

    # By module: its arguments, its named arguments, and its output
    ran: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any], Any]] = field(default_factory=dict)
    calls: list[AttentionCall] = field(default_factory=list)  # of the attention function, in order


def join_front(base: PreTrainedModel, front: AttentionFront, *, user: str, instead: str) -> tuple[FrontHandle, Watched]:
    """Put a front before a model's attention; also returns what the model was seen to do behind it.

    Raises BaseModelError, and everything is as before, for a model whose attention layers don't all go through
    transformers' attention interface, or whose own results the front would change. `user` is what needs the front,
    `instead` a sentence that tells what to do without it.
    """
    before = run_plain(base)
    handle = FrontHandle(base, front)
    try:
        with watching(base) as watched:
            after = run_plain(base)
        _check_calls(base, watched, user, instead)
    except BaseException:
        handle.remove()
        raise
    if not _same(before, after):
        handle.remove()
        if _same(before, run_plain(base)):  # else its own results change from pass to pass: there is nothing to compare
            raise BaseModelError(
                f"{type(base).__name__} gives other results once a function of ours stands before its attention, which "
                f"{user} needs. {instead}"
            )
        handle = FrontHandle(base, front)
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
def watching(base: PreTrainedModel) -> Iterator[Watched]:
    """Note what `run_plain` in the block runs, and all its calls of the attention function."""
    watched = Watched()
    handle = FrontHandle(base, _WATCH)
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


def _check_calls(base: PreTrainedModel, watched: Watched, user: str, instead: str) -> None:
    attending = {call.module for call in watched.calls}
    classes = {type(module) for module in attending}
    past = {type(module).__name__ for module in watched.ran.keys() - attending if type(module) in classes}
    if not attending or past:
        which = f"some layers of the class {sorted(past)} don't call" if past else "none of its layers calls"
        raise BaseModelError(
            f"{type(base).__name__} doesn't follow transformers' attention interface, which {user} needs: {which} the "
            f"attention function. {instead}"
        )


def _same(first: Tensor, second: Tensor) -> bool:
    equal = (first == second) | (first.isnan() & second.isnan()) if first.shape == second.shape else None
    return equal is not None and bool(equal.all())


_watched: ContextVar[Watched | None] = ContextVar("loraplex_watched", default=None)


def _watch(
    former: Behind,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> AttentionOutput:
    output, weights = former(module, query, key, value, attention_mask, **options)
    watched = _watched.get()
    if watched is not None:
        watched.calls.append(
            AttentionCall(
                module=module, query=query, key=key, value=value, mask=attention_mask, options=options, output=output
            )
        )
    return output, weights


def _note_module(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    watched = _watched.get()
    if watched is not None:
        watched.ran[module] = (args, kwargs, output)


_WATCH = AttentionFront(place=100, attend=_watch)  # outside of all others
