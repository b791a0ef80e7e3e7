"""The base model's modules, as transformers numbers them and as vLLM has them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.utils import parse_fine_tuned_lora_name

from loraplex.adapters.weights import ModuleShape
from loraplex.errors import UnsupportedAdapterError
from loraplex.layers.base.former_names import layout_of
from loraplex.layers.base.modules import adaptable_modules, output_module


class BaseModules:
    """Every module that an adapter can have, in registration order (that numbers LoRA layers), without weights."""

    def __init__(self, config: PreTrainedConfig, *, trust_remote_code: bool) -> None:
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        except (ValueError, KeyError, ImportError, AttributeError) as error:
            raise UnsupportedAdapterError(
                f"links and mixtures need the model's class in transformers, which numbers its modules; "
                f"{type(config).__name__} has none that can be built: {error}. Use plain adapters with this model."
            ) from error
        self.shapes: Mapping[str, ModuleShape] = adaptable_modules(model)
        self.architecture = type(model).__name__
        self.output_module = output_module(model)
        self.layout = layout_of(model, self.shapes)


class LayerIndices:
    """Where vLLM has a module: packed layers (qkv_proj) are several modules, one a slice.

    Modules are numbered over all linear LoRA layers and their slices; `first` is the number of a layer's first slice.
    """

    def __init__(self, layers: Mapping[str, Any], packed: Mapping[str, Sequence[str]], weights_mapper: Any) -> None:
        self._weights_mapper = weights_mapper
        self._names = {*layers, *(name for names in packed.values() for name in names)}
        self.first: dict[str, int] = {}
        self._modules: dict[str, int] = {}
        self.num_modules = 0
        for name, layer in layers.items():
            if not isinstance(layer, BaseLinearLayerWithLoRA):
                continue
            parts = packed.get(name, [name])
            self.first[name] = self.num_modules
            if len(parts) == layer.n_slices:
                self._modules |= {part: self.num_modules + i for i, part in enumerate(parts)}
            self.num_modules += layer.n_slices

    def name(self, path: str) -> str:
        """vLLM's name of the transformers module at `path`. Raises UnsupportedAdapterError where vLLM adapts none."""
        name, _ = parse_fine_tuned_lora_name(f"base_model.model.{path}.lora_A.weight", self._weights_mapper)
        if name not in self._names or ".experts" in name:
            raise UnsupportedAdapterError(
                f"the adapter has weights for {path!r}, where vLLM has no LoRA layer that can be used in links and "
                "mixtures (experts of a mixture of experts, or modules that lora_target_modules leaves out). Use an "
                "adapter without it, or loraplex's own engine."
            )
        return name

    def module(self, path: str) -> int:
        """The number of a linear module that can be gated. Raises UnsupportedAdapterError for others."""
        name = self.name(path)
        if name not in self._modules:
            raise UnsupportedAdapterError(
                f"an adapter of a link with a mixture adapts {path!r}, which can't be gated inside vLLM: only linear "
                "modules whose LoRA layer has one slice a module can (not embeddings, not lm_head). Use loraplex's own "
                "engine."
            )
        return self._modules[name]
