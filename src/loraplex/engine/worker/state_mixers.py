"""State mixers in packed passes: each sequence goes on from its own state.

A mixer runs once for all single tokens, as sequences of one token, and once for each longer chunk, by transformers' own
code and with transformers' own cache.
"""

import threading
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from loraplex.engine.worker.input_batch import current_input_batch
from loraplex.engine.worker.routing import PackedRouting
from loraplex.engine.worker.state_pool import Group, PassStates
from loraplex.engine.worker.state_shapes import cut_tokens
from loraplex.routing.routing import current_routing

_JOINED = "loraplex_state_mixer"  # on a mixer: how many engines run it apart
_lock = threading.RLock()
_classes: dict[type[nn.Module], type[nn.Module]] = {}  # by a mixer's own
_formers: dict[type[nn.Module], type[nn.Module]] = {}  # the other way round


def join_mixers(mixers: Collection[nn.Module]) -> None:
    """Let modules run sequence by sequence in packed passes; outside of one they are what they were."""
    with _lock:
        for module in mixers:
            joined = vars(module).get(_JOINED, 0)
            if joined == 0:
                module.__class__ = _class_of(type(module))
            vars(module)[_JOINED] = joined + 1


def leave_mixers(mixers: Collection[nn.Module]) -> None:
    """Undo one `join_mixers`."""
    with _lock:
        for module in mixers:
            vars(module)[_JOINED] -= 1
            if vars(module)[_JOINED] == 0:
                del vars(module)[_JOINED]
                module.__class__ = _formers[type(module)]


def _class_of(former: type[nn.Module]) -> type[nn.Module]:
    if former not in _classes:

        def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            batch = current_input_batch()
            if batch is None or batch.states is None:
                return former.forward(self, *args, **kwargs)
            return _run_apart(self, former, batch.states, args, kwargs)

        # The module's own namespace: transformers looks there for functions that belong to a class.
        ours = type(former.__name__, (former,), {"forward": run, "__module__": former.__module__})
        _classes[former], _formers[ours] = ours, former
    return _classes[former]


def _run_apart(
    module: nn.Module, former: type[nn.Module], states: PassStates, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:  # [1, tokens, hidden]
    outputs = [_run_group(module, former, states, group, args, kwargs) for group in states.groups]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def _run_group(
    module: nn.Module,
    former: type[nn.Module],
    states: PassStates,
    group: Group,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Tensor:  # [1, tokens of the group, hidden]
    where = (states.num_tokens, group.start, group.stop)
    own_args = [cut_tokens(value, *where, apart=group.is_single) for value in args]
    own = {name: cut_tokens(value, *where, apart=group.is_single) for name, value in kwargs.items()}
    shape, layer = states.shape_of(module), states.begin(module, group)
    own[shape.cache_argument] = shape.cache_with(layer)
    routing = current_routing()
    assert isinstance(routing, PackedRouting), "a packed pass runs without its routing"
    with routing.only(group.first_part, group.stop_part):
        out = former.forward(module, *own_args, **own)
    states.take(module, group, layer)
    return out.reshape(1, group.stop - group.start, -1)
