"""More keys and values, for scaling passes and linked residuals: copies of attention layers, with their own caches."""

import copy
import dataclasses
from collections.abc import Mapping, MutableMapping
from typing import Any

from vllm.forward_context import ForwardContext
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionType

from loraplex.errors import UnsupportedEngineError

SCALING = "loraplex_scaling."  # what the names of the scaling pass's copies begin with


def attention_layers(registry: Mapping[str, Any], what: str) -> dict[str, Any]:
    """The model's own attention layers in vLLM's registry, before there are copies.

    Raises UnsupportedEngineError where one is of another kind than copies are known to be right for; `what` needs them.
    """
    layers = {name: layer for name, layer in registry.items() if isinstance(layer, AttentionLayerBase)}
    for name, layer in layers.items():
        _check_layer(name, layer, what)
    return layers


class SecondCache:
    """Copies of the attention layers, under other names in vLLM's registry.

    vLLM allocates keys and values for what is in its registry, and fills metadata and slots for it: the copies get
    the same blocks in memory of their own, so that chunks, preemption and the prefix cache hold for both passes.
    """

    def __init__(self, registry: MutableMapping[str, Any], layers: Mapping[str, Any], prefix: str = SCALING) -> None:
        """Register the copies; before vLLM asks the layers for their caches."""
        self.copies: Mapping[str, Any] = {name: _copy_layer(prefix + name, layer) for name, layer in layers.items()}
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
    copied.layer_name = name
    return copied


def _check_layer(name: str, layer: Any, what: str) -> None:
    if type(layer) is not Attention or layer.attn_type != AttentionType.DECODER:
        kind = type(layer).__name__
        raise UnsupportedEngineError(
            f"{name!r} is a {kind}: {what} need models whose attention layers are all causal ones of vLLM's class "
            "Attention (no state-space or hybrid models, no latent or cross attention). Serve this model without "
            f"{what}."
        )
    if layer.kv_sharing_target_layer_name is not None:
        raise UnsupportedEngineError(
            f"{name!r} shares keys and values with {layer.kv_sharing_target_layer_name!r}, which {what} "
            f"don't support. Serve this model without {what}."
        )
