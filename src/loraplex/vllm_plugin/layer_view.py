"""A LoRA layer's own view of vLLM's Punica wrapper: it says which layer calls. Without vLLM it can be tested."""

from typing import Any

import torch
from torch import Tensor

from loraplex.vllm_plugin.gates import GateBuffers
from loraplex.vllm_plugin.routers import Routers, SumRanks


class LayerView:
    """Stands between a layer and the wrapper that all layers share; calls go on with the layer's modules added."""

    def __init__(self, wrapper: Any, first_module: int, sum_ranks: SumRanks | None = None) -> None:
        """`sum_ranks` of a layer whose workers each have a part of the values in rank space."""
        self._wrapper = wrapper
        self._layer: dict[str, Any] = {"loraplex_first_module": first_module}
        if sum_ranks is not None:
            self._layer["loraplex_sum_ranks"] = sum_ranks

    def add_lora_linear(self, *args: Any, **kwargs: Any) -> Any:
        return self._wrapper.add_lora_linear(*args, **kwargs, **self._layer)

    def add_shrink(self, *args: Any, **kwargs: Any) -> Any:
        return self._wrapper.add_shrink(*args, **kwargs)

    def add_expand(self, *args: Any, **kwargs: Any) -> Any:
        """Fully sharded layers call it directly, after they have gathered the values in rank space."""
        return self._wrapper.add_expand(*args, **kwargs, **self._layer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapper, name)


def gate_expansion(wrapper: Any, buffers: GateBuffers | None, routers: Routers | None = None) -> None:
    """Let a wrapper gate the values in rank space of layers that say who they are, before it expands them."""
    kind = type(wrapper)

    def add_expand(
        self: Any,
        y: Tensor,
        x: Any,
        *args: Any,
        loraplex_first_module: int = -1,
        loraplex_sum_ranks: SumRanks | None = None,
        **kwargs: Any,
    ) -> Any:
        if loraplex_first_module >= 0:
            if routers is not None:
                routers.apply(x, loraplex_first_module, loraplex_sum_ranks)
            if buffers is not None:
                buffers.apply(x, loraplex_first_module)
        return kind.add_expand(self, y, x, *args, **kwargs)

    wrapper.__class__ = type(f"Gated{kind.__name__}", (kind,), {"add_expand": add_expand})


def passes_keywords_on(kind: type) -> bool:
    """Whether a wrapper's add_lora_linear hands keywords that it doesn't know to its own add_expand."""
    seen: dict[str, Any] = {}
    probe: Any = object.__new__(kind)
    probe.add_shrink = lambda *args, **kwargs: None
    probe.add_expand = lambda *args, **kwargs: seen.update(kwargs)
    x, weights = torch.zeros(1, 1), torch.zeros(1, 1, 1, 1)
    probe.add_lora_linear(x, x, (weights,), (weights,), 1.0, (1,), loraplex_first_module=7)
    return seen.get("loraplex_first_module") == 7
