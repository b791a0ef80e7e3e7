"""Rotary positions that depend on the length of a sequence, told for every token of a packed pass as for its own.

Not by the kind of position: a module that turns positions into cosines and sines is asked about one position in
sequences of many lengths, and only one whose answers differ is joined.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import GenerationMixin, PreTrainedModel

from loraplex.engine.kv.sequence_kv import LengthRule
from loraplex.engine.worker.input_batch import InputBatch, current_input_batch
from loraplex.errors import BaseModelError

Call = tuple[tuple[Any, ...], dict[str, Any]]  # what such a module was called with


class RotaryPositions:
    """The modules of one base model whose positions depend on a length, joined to packed passes."""

    def __init__(self, base: PreTrainedModel, calls: list[tuple[nn.Module, Call]], longest: int) -> None:
        """`calls` are those that a forward pass made of its rotary modules. Raises BaseModelError."""
        self.rule = LengthRule()
        self._handles: list[RemovableHandle] = []
        self._joined: dict[nn.Module, Call] = {}
        for module, call in calls:
            rule = _rule_of(module, call, longest)
            if rule.threshold is None:
                continue
            if self._joined and rule != self.rule:
                raise BaseModelError(
                    f"{type(base).__name__} has several positions that change with a sequence's length, one at "
                    f"{self.rule.threshold} tokens and one at {rule.threshold}, which the engine doesn't know. Set "
                    f"EngineConfig.max_length to at most {min(self.rule.threshold or 0, rule.threshold)}."
                )
            self.rule = rule
            if module not in self._joined:
                self._joined[module] = call
                self._join(module)
        if self.rule.threshold is not None and _begins_anew(base, self.rule.threshold):
            step, threshold = self.rule.is_step, self.rule.threshold
            self.rule = LengthRule(threshold=threshold, is_step=step, begins_anew=True)

    def forget(self) -> None:
        """Let the modules forget the longest sequence that they were asked about: some go on with its frequencies."""
        for module, call in self._joined.items():
            args, kwargs = _with_positions(call, torch.zeros(1, dtype=torch.int64, device=_device(call)))
            module.forward(*args, **kwargs)

    def leave(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _join(self, module: nn.Module) -> None:
        own = copy.deepcopy(module)  # some keep what they computed last: other passes of the base model see none of it

        def hide(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
            """Let the base model's module see nothing of a packed pass, whose result is thrown away."""
            batch = current_input_batch()
            return None if batch is None else _with_positions((args, kwargs), torch.zeros_like(batch.positions))

        def replace(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            batch = current_input_batch()
            return None if batch is None else _of_batch(own, (args, kwargs), batch, self.rule)

        self._handles.append(module.register_forward_pre_hook(hide, with_kwargs=True))
        self._handles.append(module.register_forward_hook(replace, with_kwargs=True))


def is_rotary(module: nn.Module) -> bool:
    """Whether a module may turn positions into cosines and sines: it has no parts but frequencies."""
    buffers = (name for name, _ in module.named_buffers(recurse=False))
    return not list(module.children()) and (hasattr(module, "rope_type") or any("inv_freq" in name for name in buffers))


def _of_batch(module: nn.Module, call: Call, batch: InputBatch, rule: LengthRule) -> Any:
    """What a module tells for each token of a packed batch, in a sequence of the token's length."""
    positions, lengths = batch.position_ids, batch.lengths
    assert rule.threshold is not None, "a module whose positions don't depend on a length was joined"
    if rule.is_step:  # both and a choice, which a recorded step can hold
        short = _told(module, call, positions.clamp(max=rule.threshold - 1), positions.new_ones(1))
        long = _told(module, call, positions, positions.new_full((1,), rule.threshold + 1))
        is_long = lengths > rule.threshold
        return _combine(lambda a, b: torch.where(_as_rows(is_long, a), b, a), short, long)
    result = None
    for length in lengths.clamp(min=rule.threshold).unique():
        own = (lengths.clamp(min=rule.threshold) == length).nonzero().squeeze(1)
        told = _told(module, call, positions[own], length.unsqueeze(0))
        if result is None:
            result = _combine(lambda a, _: a.new_empty(*a.shape[:-2], len(positions), a.shape[-1]), told, told)
        _combine(partial(_put, own), result, told)
    return result


def _put(places: Tensor, result: Tensor, values: Tensor) -> Tensor:
    return result.index_copy_(result.ndim - 2, places, values)


def _told(module: nn.Module, call: Call, positions: Tensor, length: Tensor) -> Any:
    """Of `positions` [n] in a sequence of `length` [1] tokens or as many as the largest position needs."""
    nothing, kwargs = _with_positions(call, torch.zeros_like(length))
    module.forward(*nothing, **kwargs)  # a length that was seen last is forgotten by a short one
    args, kwargs = _with_positions(call, torch.cat([positions, length - 1]))
    return _combine(lambda a, _: a[..., :-1, :], *[module.forward(*args, **kwargs)] * 2)


def _combine(run: Callable[[Tensor, Tensor], Tensor], first: Any, second: Any) -> Any:
    """`run` on each tensor [.., tokens, dim] of two results, which are one tensor or several."""
    if isinstance(first, Tensor):
        return run(first, second)
    return tuple(run(a, b) for a, b in zip(first, second, strict=True))


def _as_rows(chosen: Tensor, like: Tensor) -> Tensor:
    return chosen.unsqueeze(1).expand(like.shape[-2:])


def _with_positions(call: Call, positions: Tensor) -> Call:
    """The call with other positions [n] in the place of its own [.., tokens]."""
    args, kwargs = call

    def other(value: Any) -> Any:
        is_positions = isinstance(value, Tensor) and value.dtype in (torch.int64, torch.int32)
        return positions.expand(*value.shape[:-1], len(positions)) if is_positions else value

    return tuple(map(other, args)), {name: other(value) for name, value in kwargs.items()}


def _rule_of(module: nn.Module, call: Call, longest: int) -> LengthRule:
    """From which length on a module tells something else of position 1, and whether it changes once."""
    if not any(isinstance(value, Tensor) and not value.is_floating_point() for value in (*call[0], *call[1].values())):
        return LengthRule()
    own = copy.deepcopy(module)

    def told(length: int) -> Tensor:
        position = torch.ones(1, dtype=torch.int64, device=_device(call))
        result = _told(own, call, position, position * length)
        tensors = [result] if isinstance(result, Tensor) else list(result)
        return torch.cat([torch.view_as_real(t).flatten() if t.is_complex() else t.flatten() for t in tensors]).float()

    short = told(2)
    lengths = {longest, longest // 2, *(2**n for n in range(2, longest.bit_length()))}
    changed = [length for length in sorted(lengths) if 2 < length <= longest and not torch.equal(told(length), short)]
    if not changed:
        return LengthRule()
    low, high = max((n for n in lengths if n < changed[0]), default=2), changed[0]  # `told` is short's at the first
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if torch.equal(told(middle), short) else (low, middle)
    is_step = all(torch.equal(told(high), told(length)) for length in (high + 1, *changed) if length <= longest)
    return LengthRule(threshold=low, is_step=is_step)


def _device(call: Call) -> torch.device:
    return next(value.device for value in (*call[0], *call[1].values()) if isinstance(value, Tensor))


class _Cache:
    """As much of a cache as a model looks at to decide whether to go on with it."""

    is_compileable = False

    def __init__(self, length: int) -> None:
        self._length = length

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._length

    def __len__(self) -> int:
        return 1


def _begins_anew(base: PreTrainedModel, threshold: int) -> bool:
    """Whether `generate` drops what it has computed in the step in which a sequence outgrows the threshold."""
    prepare = getattr(base, "prepare_inputs_for_generation", None)
    if prepare is None or prepare.__func__ is GenerationMixin.prepare_inputs_for_generation:
        return False
    ids = torch.ones(1, threshold + 1, dtype=torch.int64, device=base.device)
    options = {"attention_mask": torch.ones_like(ids), "use_cache": True, "next_sequence_length": 1}
    try:
        inputs = prepare(ids, past_key_values=_Cache(threshold), **options)
    except Exception as error:
        raise BaseModelError(
            f"whether {type(base).__name__} computes sequences anew that outgrow {threshold} tokens can't be told "
            f"({type(error).__name__}: {error}). Set EngineConfig.max_length to at most {threshold}."
        ) from error
    return inputs.get("past_key_values") is None
