"""Attaching LoRA layers to a transformers model."""

import threading
from collections.abc import Iterable

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from loraplex.adapters.weights import ModuleShape
from loraplex.layers.gated import GatedEmbedding, GatedLinear
from loraplex.layers.linear import LoraLinear, become_linear, become_lora_linear, can_become_lora_linear
from loraplex.layers.modules import adaptable_modules, output_module
from loraplex.layers.output import LoraOutput, rounds_logits
from loraplex.layers.shared_input import SharedInputs


class AdaptableModel:
    """A base model's adaptable modules and the LoRA layers attached to them so far."""

    def __init__(self, base: PreTrainedModel) -> None:
        self.shapes: dict[str, ModuleShape] = adaptable_modules(base)
        self.paths = list(self.shapes)
        self.module_index = {path: index for index, path in enumerate(self.paths)}
        self.modules: dict[str, nn.Module] = {path: base.get_submodule(path) for path in self.paths}
        self.output_module = output_module(base)
        self._handles: dict[str, RemovableHandle] = {}
        self._lora_linears: set[str] = set()
        self._shared: SharedInputs[LoraLinear] = SharedInputs()
        self._lock = threading.Lock()  # two threads that load at once must not attach a layer twice

    def attach(self, paths: Iterable[str]) -> None:
        """Attach a LoRA layer to each module that has none yet; modules never adapted pay nothing.

        A plain nn.Linear becomes a LoraLinear; any other module (Conv1D, embedding, quantized, offloaded) keeps its
        class and gets a hook.
        """
        with self._lock:
            for path in paths:
                if path in self._handles or path in self._lora_linears:
                    continue
                module, index = self.modules[path], self.module_index[path]
                if can_become_lora_linear(module):
                    as_class = LoraOutput if path == self.output_module else LoraLinear
                    become_lora_linear(module, index, path, self._shared, as_class=as_class)
                    self._lora_linears.add(path)
                    continue
                layer_class = GatedEmbedding if self.shapes[path].kind == "embedding" else GatedLinear
                self._handles[path] = module.register_forward_hook(layer_class(index, path))

    def attach_all_plain_linears(self) -> None:
        """Attach a LoRA layer to every plain nn.Linear, so that all of them can decode fast."""
        self.attach([path for path in self.paths if can_become_lora_linear(self.modules[path])])

    def attach_output(self) -> None:
        """Attach the output layer's if it rounds logits to 16 bits; under `choosing_tokens` it then doesn't."""
        path = self.output_module
        if path in self.modules and can_become_lora_linear(self.modules[path]) and rounds_logits(self.modules[path]):
            self.attach([path])

    def detach(self) -> None:
        """Give the base model back as it was."""
        with self._lock:
            for handle in self._handles.values():
                handle.remove()
            for path in self._lora_linears:
                become_linear(self.modules[path])
            self._handles.clear()
            self._lora_linears.clear()
