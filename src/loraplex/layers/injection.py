"""Attaching LoRA layers to a transformers model, only where an adapter needs one."""

from collections.abc import Iterable

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from loraplex.adapters.weights import ModuleShape
from loraplex.layers.gated import GatedEmbedding, GatedLinear
from loraplex.layers.modules import adaptable_modules, output_module


class AdaptableModel:
    """A base model's adaptable modules and the LoRA layers attached to them so far."""

    def __init__(self, base: PreTrainedModel) -> None:
        self.shapes: dict[str, ModuleShape] = adaptable_modules(base)
        self.paths = list(self.shapes)
        self.module_index = {path: index for index, path in enumerate(self.paths)}
        self.modules: dict[str, nn.Module] = {path: base.get_submodule(path) for path in self.paths}
        self.output_module = output_module(base)
        self._handles: dict[str, RemovableHandle] = {}

    def attach(self, paths: Iterable[str]) -> None:
        """Attach a LoRA layer to each module that has none yet; modules never adapted pay nothing."""
        for path in paths:
            if path not in self._handles:
                layer_class = GatedEmbedding if self.shapes[path].kind == "embedding" else GatedLinear
                layer = layer_class(self.module_index[path], path)
                self._handles[path] = self.modules[path].register_forward_hook(layer)

    def detach(self) -> None:
        """Give the base model back as it was."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()
