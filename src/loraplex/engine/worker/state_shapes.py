"""What a module keeps for each sequence beside keys and values, in transformers' own form."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, LinearAttentionCacheLayerMixin, LinearAttentionLayer


class StateKey(NamedTuple):
    """One tensor of a layer's state."""

    kind: str  # "conv" or "recurrent"
    number: int  # among the layer's


@dataclass(frozen=True, kw_only=True)
class MixerShape:
    """What one state mixer keeps for a sequence, and how it is called."""

    layer: int  # its number in transformers' cache
    num_states: int
    kernel_sizes: dict[int, int | None]  # tokens that a convolution's state holds
    cache_argument: str  # the keyword under which it takes the cache
    states: dict[StateKey, tuple[torch.Size, torch.dtype]]  # of one sequence

    @property
    def sequence_bytes(self) -> int:
        return sum(size.numel() * dtype.itemsize for size, dtype in self.states.values())

    def new_layer(self, states: dict[StateKey, Tensor] | None = None) -> LinearAttentionLayer:
        """A layer of transformers' cache: at the beginning of a sequence, or with states [sequences, ...]."""
        layer = LinearAttentionLayer(number_of_states=self.num_states)
        for key, values in (states or {}).items():
            if key.kind == "conv":
                layer.conv_states[key.number] = values
                layer.is_conv_states_initialized[key.number] = True
                layer.conv_kernel_size[key.number] = self.kernel_sizes[key.number]
                layer.device, layer.dtype = values.device, values.dtype  # type: ignore[assignment]
            else:
                layer.recurrent_states[key.number] = values
                layer.is_recurrent_states_initialized[key.number] = True
            layer.has_previous_state[key.number] = True
        return layer

    def cache_with(self, layer: LinearAttentionLayer) -> Cache:
        """A cache that has this layer and no other."""
        return Cache(layers=[None] * self.layer + [layer])  # type: ignore[arg-type]

    def states_of(self, layer: LinearAttentionLayer) -> dict[StateKey, Tensor]:  # [sequences, ...] each
        return {key: state_of(layer, key) for key in self.states}


def state_of(layer: LinearAttentionCacheLayerMixin, key: StateKey) -> Tensor:  # [sequences, ...]
    states = (layer.conv_states if key.kind == "conv" else layer.recurrent_states)[key.number]
    assert states is not None, f"a mixer left no {key.kind} state"
    return states


def cut_tokens(value: Any, num_tokens: int, start: int, stop: int, *, apart: bool = False) -> Any:
    """The tokens [start, stop) of a tensor [1, num_tokens, ...], side by side or as sequences of one token each."""
    if not isinstance(value, Tensor) or value.shape[:2] != (1, num_tokens):
        return value
    return value[0, start:stop].unsqueeze(1 if apart else 0)
