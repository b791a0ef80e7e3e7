"""The scaling pass's own keys and values: a copy of every attention layer, with a cache of its own."""

import copy
import dataclasses
from collections.abc import Mapping, MutableMapping
from typing import Any

from vllm.forward_context import ForwardContext
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionType

from loraplex.errors import UnsupportedEngineError

PREFIX = "loraplex_scaling."  # of the copies' names


class SecondCache:
    """Copies of the attention layers, under other names in vLLM's registry.

    vLLM allocates keys and values for what is in its registry, and fills metadata and slots for it: the copies get
    the same blocks in memory of their own, so that chunks, preemption and the prefix cache hold for both passes.
    """

    def __init__(self, registry: MutableMapping[str, Any]) -> None:
        """Register the copies; before vLLM asks the layers for their caches."""
        layers = {name: layer for name, layer in registry.items() if isinstance(layer, AttentionLayerBase)}
        for name, layer in layers.items():
            _check_layer(name, layer)
        self.copies: Mapping[str, Any] = {name: _copy_layer(name, layer) for name, layer in layers.items()}
        registry.update({copied.layer_name: copied for copied in self.copies.values()})
        self.names = {name: copied.layer_name for name, copied in self.copies.items()}

    def scaling_context(self, context: ForwardContext) -> ForwardContext:
        """The context of a forward pass in which every attention layer reads and writes its copy's cache."""
        return dataclasses.replace(
            context,
            no_compile_layers={**context.no_compile_layers, **self.copies},
            attn_metadata=self._of_copies(context.attn_metadata),
            slot_mapping=self._of_copies(context.slot_mapping),
            moe_layer_index=0,
        )

    def _of_copies(self, by_name: Any) -> dict[str, Any]:
        if not isinstance(by_name, dict):
            raise UnsupportedEngineError(
                f"the forward context holds a {type(by_name).__name__} where one batch's values by layer name were "
                "expected. loraplex runs mixtures without microbatches (enable_dbo) and speculative decoding."
            )
        return {**by_name, **{name: by_name[copied] for name, copied in self.names.items() if copied in by_name}}


def _copy_layer(name: str, layer: Any) -> Any:
    copied = copy.copy(layer)
    copied.layer_name = PREFIX + name
    return copied


def _check_layer(name: str, layer: Any) -> None:
    if type(layer) is not Attention or layer.attn_type != AttentionType.DECODER:
        kind = type(layer).__name__
        raise UnsupportedEngineError(
            f"{name!r} is a {kind}: mixtures need models whose attention layers are all causal ones of vLLM's class "
            "Attention (no state-space or hybrid models, no latent or cross attention). Serve this model without "
            "mixtures."
        )
    if layer.kv_sharing_target_layer_name is not None:
        raise UnsupportedEngineError(
            f"{name!r} shares keys and values with {layer.kv_sharing_target_layer_name!r}, which mixtures don't "
            "support. Serve this model without mixtures."
        )
