"""Which modules of a base model keep a state for each sequence beside keys and values: the state mixers.

Linear attention, state space models and short convolutions do. They are known by what they do: a module that updates
transformers' cache of such states while the base model runs.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin, LinearAttentionLayer

from loraplex.engine.worker.state_shapes import MixerShape, StateKey, cut_tokens, state_of
from loraplex.errors import BaseModelError

_TOKENS = 8
_PIECES = ((0, 4), (4, 7), (7, 8))  # how a mixer is given them, to see whether it goes on from its state
# How far their outputs may be from those of all tokens at once, relative to their size: rounding.
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
_LARGEST_TOLERANCE = 0.1


@dataclass
class MixerCall:
    """How a module was called that updated states."""

    layer: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    updated: set[StateKey] = field(default_factory=set)


def find_mixers(base: PreTrainedModel, attention: Collection[nn.Module]) -> dict[nn.Module, MixerShape]:
    """The state mixers of a base model beside its attention modules. Raises BaseModelError for those of other forms."""
    with torch.no_grad():
        cache = _record(base)
        if cache is None:
            return {}
        mixers = {module: _shape(module, call, cache) for module, call in cache.calls.items()}
        for module in mixers:
            if set(attention) & set(module.modules()):
                raise _refusal(module, "keeps a state and attends in one")
        for module in {type(module): module for module in mixers}.values():
            _check_goes_on(module, mixers[module], cache.calls[module])
    return mixers


class _RecordingCache(DynamicCache):
    """Transformers' cache, which notes who updates its states."""

    def __init__(self, base: PreTrainedModel, running: "list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]"):
        super().__init__(config=base.config.get_text_config(decoder=True))
        self.calls: dict[nn.Module, MixerCall] = {}
        self._running = running

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **options: Any) -> Tensor:
        self._note(layer_idx, StateKey("conv", state_idx))
        return super().update_conv_state(conv_states, layer_idx, state_idx, **options)

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **options: Any
    ) -> Tensor:
        self._note(layer_idx, StateKey("recurrent", state_idx))
        return super().update_recurrent_state(recurrent_states, layer_idx, state_idx, **options)

    def _note(self, layer: int, key: StateKey) -> None:
        module, args, kwargs = self._running[-1]
        call = self.calls.setdefault(module, MixerCall(layer, args, kwargs))
        if key in call.updated:
            raise _refusal(module, "updates a state more than once in a pass")
        call.updated.add(key)


def _record(base: PreTrainedModel) -> _RecordingCache | None:
    """What updates states while a few tokens run; None for a model without such a cache."""
    with _running_modules(base) as running:
        cache = _RecordingCache(base, running)
        if not any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers):
            return None
        ids = torch.arange(1, 1 + _TOKENS, device=base.device).unsqueeze(0)
        try:
            base(input_ids=ids, past_key_values=cache, use_cache=True)
        except (AttributeError, KeyError, TypeError, ValueError):
            return None  # its states have another form: whoever mixes tokens is found by `check_flow`
        return cache


@contextmanager
def _running_modules(base: PreTrainedModel) -> "Iterator[list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]]":
    """The modules that run now, the innermost last, with their arguments."""
    running: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = []

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        running.append((module, args, kwargs))

    def end(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        running.pop()

    handles: list[RemovableHandle] = []
    for module in base.modules():
        handles.append(module.register_forward_pre_hook(begin, with_kwargs=True))
        handles.append(module.register_forward_hook(end))
    try:
        yield running
    finally:
        for handle in handles:
            handle.remove()


def _shape(module: nn.Module, call: MixerCall, cache: _RecordingCache) -> MixerShape:
    argument = next((name for name, value in call.kwargs.items() if value is cache), None)
    hidden = call.args[0] if call.args else call.kwargs.get("hidden_states")
    if argument is None or not isinstance(hidden, Tensor) or hidden.shape[:2] != (1, _TOKENS):
        raise _refusal(module, "keeps a state and is called in another form than (hidden_states, cache)")
    layer = cache.layers[call.layer]
    assert isinstance(layer, LinearAttentionCacheLayerMixin), "states were updated in a layer that has none"
    states = {key: state_of(layer, key) for key in sorted(call.updated)}
    return MixerShape(
        layer=call.layer,
        num_states=layer.number_of_states,
        kernel_sizes=dict(layer.conv_kernel_size),
        cache_argument=argument,
        states={key: (values.shape[1:], values.dtype) for key, values in states.items()},
    )


def _check_goes_on(module: nn.Module, shape: MixerShape, call: MixerCall) -> None:
    """Raises BaseModelError unless several tokens after a state give what all tokens at once give."""
    whole = _run(module, shape, call, shape.new_layer(), 0, _TOKENS)
    layer, pieces = shape.new_layer(), []
    for start, stop in _PIECES:
        if start > 0:
            for key in shape.states:
                _check_reads(module, shape, call, shape.states_of(layer), key, start, stop)
        pieces.append(_run(module, shape, call, layer, start, stop))
    difference = (torch.cat(pieces, dim=1) - whole).float().norm() / whole.float().norm()
    if not difference <= _TOLERANCE.get(whole.dtype, _LARGEST_TOLERANCE):  # not for NaN
        raise _refusal(module, "keeps a state from which it doesn't go on as if all tokens came at once")


def _check_reads(
    module: nn.Module,
    shape: MixerShape,
    call: MixerCall,
    states: dict[StateKey, Tensor],
    spoilt: StateKey,
    start: int,
    stop: int,
) -> None:
    """A state of NaN must be seen in the next token: in every dtype, whatever rounding hides."""
    copies = {key: value.clone() for key, value in states.items()}
    copies[spoilt].fill_(torch.nan)
    out = _run(module, shape, call, shape.new_layer(copies), start, stop)
    if not out[:, 0].isnan().any():
        raise _refusal(module, f"doesn't read its {spoilt.kind} state where {stop - start} tokens follow")


def _run(
    module: nn.Module, shape: MixerShape, call: MixerCall, layer: LinearAttentionLayer, start: int, stop: int
) -> Tensor:  # [1, tokens, hidden]
    args = [cut_tokens(value, _TOKENS, start, stop) for value in call.args]
    kwargs = {name: cut_tokens(value, _TOKENS, start, stop) for name, value in call.kwargs.items()}
    kwargs[shape.cache_argument] = shape.cache_with(layer)
    out = module(*args, **kwargs)
    if not isinstance(out, Tensor) or out.shape[:2] != (1, stop - start):
        raise _refusal(module, "keeps a state and returns something else than its tokens")
    return out


def _refusal(module: nn.Module, what: str) -> BaseModelError:
    return BaseModelError(
        f"{type(module).__name__} {what}, which the engine can't keep apart for the sequences of a packed pass. Use "
        "MultiLoraModel.generate for this model."
    )
