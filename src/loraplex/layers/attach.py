"""Attaching LoRA layers to a transformers model."""

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from loraplex.adapters.weights import ModuleShape
from loraplex.errors import RequestError, UnsupportedAdapterError
from loraplex.layers.base.former_names import layout_of
from loraplex.layers.base.modules import adaptable_modules, output_module
from loraplex.layers.base.output_layer import LoraOutput, rounds_logits
from loraplex.layers.base.parameters import adaptable_parameters, parameter_names
from loraplex.layers.experts.moe_experts import become_lora_experts, become_plain_experts
from loraplex.layers.experts.moe_router import LoraRouter, become_lora_router, become_plain_router, multiplies_once
from loraplex.layers.lora_layer import GatedEmbedding, GatedLinear
from loraplex.layers.lora_linear import LoraLinear, become_linear, become_lora_linear, can_become_lora_linear
from loraplex.layers.own_weights.changed_output import ChangedEmbedding, ChangedOutput
from loraplex.layers.quantized.cpu_order_4bit import bring_into_cpu_order, restore_first_weight
from loraplex.layers.quantized.int8_outliers import has_outliers, join_tokens, keep_tokens_apart
from loraplex.layers.quantized.kinds import BNB_4BIT, BNB_INT8, quantized_modules
from loraplex.layers.quantized.repeated_warning import warn_of_casts_once
from loraplex.layers.rows.order import RowOrder
from loraplex.layers.rows.passes import attach_pass_length
from loraplex.layers.rows.probe import RowProbe, probe_rows
from loraplex.layers.shared_input import SharedInputs
from loraplex.mapped_files import let_file_pages_go, trim_heap
from loraplex.validation import listed


class Removable(Protocol):
    """What was given to a base model and can be taken back."""

    def remove(self) -> None: ...


class AdaptableModel:
    """A base model's adaptable modules and the LoRA layers attached to them so far."""

    def __init__(self, base: PreTrainedModel) -> None:
        self._base = base
        self.shapes: dict[str, ModuleShape] = adaptable_modules(base) | adaptable_parameters(base)
        self.paths = list(self.shapes)
        self.module_index = {path: index for index, path in enumerate(self.paths)}
        # Of a parameter, the module that owns it.
        self.modules: dict[str, nn.Module] = {path: base.get_submodule(self._module_path(path)) for path in self.paths}
        self.output_module = output_module(base)
        self.layout = layout_of(base, self.shapes)
        embedding = next((path for path, shape in self.shapes.items() if shape.kind == "embedding"), None)
        # The input embedding and the output layer, as far as there are such: they have a row for each token.
        self.tables = tuple(path for path in (embedding, self.output_module) if path is not None)
        self._handles: dict[str, RemovableHandle] = {}
        self._hooks: dict[str, GatedLinear | GatedEmbedding] = {}
        self._lora_linears: set[str] = set()
        self._adapted_parameters: set[str] = set()
        self._others: dict[str, Sequence[Removable]] = {}
        self._changed: dict[str, Sequence[RemovableHandle]] = {}  # modules whose own weights adapters change
        self._other_orders: dict[str, RowOrder] = {}  # of modules that factors can't adapt
        self._was_detached = False
        self._probe: RowProbe | None = None
        self._shared: SharedInputs[LoraLinear] = SharedInputs()
        self._lock = threading.Lock()  # two threads that load at once must not attach a layer twice
        self._reordered: list[nn.Module] = []
        self._apart: list[nn.Module] = []
        self._prepare_quantized()

    def _prepare_quantized(self) -> None:
        """Let quantized modules give each token what it gets alone, and be put back as they were."""
        unused: list[tuple[int, int]] = []
        for _, module, kind in quantized_modules(self._base):
            if kind is BNB_4BIT:
                former: Any = module.weight
                place = (former.data_ptr(), former.data_ptr() + former.nbytes)
                if bring_into_cpu_order(module):
                    unused.append(place)
                    self._reordered.append(module)
                    trim_heap()
            elif kind is BNB_INT8:
                warn_of_casts_once()
                if has_outliers(module):
                    keep_tokens_apart(module)
                    self._apart.append(module)
        let_file_pages_go(unused)

    def check(self, paths: Iterable[str]) -> None:
        """Raise UnsupportedAdapterError for modules that no adapter can be added to."""
        with self._lock:
            wrong = self._probed().not_linear.intersection(paths)
        if wrong:
            raise UnsupportedAdapterError(
                f"the adapter has weights for modules whose output isn't one vector for each input: {listed(wrong)} "
                "(such as routers, which also choose). PEFT can't adapt them either. Leave them out of target_modules."
            )
        unclear = [
            path for path in paths if self.shapes[path].kind == "router" and not multiplies_once(self.modules[path])
        ]
        if unclear:
            raise UnsupportedAdapterError(
                f"target_parameters names {listed(unclear)}, whose modules do something else with them than one "
                "product with each input, which adapters can't follow. Leave them out of target_parameters."
            )

    def order_of(self, path: str) -> RowOrder:
        """In which order the module sees the tokens of several rows."""
        with self._lock:
            return self._probed().orders.get(path, RowOrder.UNKNOWN)

    def unseen(self) -> list[int]:
        """The modules that tokens alone don't reach: those of images, for example."""
        with self._lock:
            seen = self._probed().orders
        return [index for path, index in self.module_index.items() if path not in seen]

    def attach(self, paths: Iterable[str]) -> None:
        """Attach a LoRA layer to each module that has none yet; modules never adapted pay nothing.

        A plain nn.Linear becomes a LoraLinear; any other module (Conv1D, embedding, quantized, offloaded) keeps its
        class and gets a hook.
        """
        with self._lock:
            self._probed()
            self._attach(paths)
        self.attach_once("pass length", lambda: attach_pass_length(self._base))

    def attach_changes(self, paths: Iterable[str]) -> None:
        """Let adapters change these modules' own weights; behind the LoRA layers, which read the base's output."""
        with self._lock:
            new = [path for path in paths if path not in self._changed]
            if not new:
                return
            self._probed()
            self._probe_others([path for path in new if path not in self.shapes])
            for path in new:
                self._changed[path] = self._hook_changes(path)
        self.attach_once("pass length", lambda: attach_pass_length(self._base))

    def _hook_changes(self, path: str) -> list[RemovableHandle]:
        module, order = self._base.get_submodule(path), self._order_of_any(path)
        if path in self.shapes and self.shapes[path].kind == "embedding":
            hook = ChangedEmbedding(path, order)
            return [module.register_forward_pre_hook(hook.before), module.register_forward_hook(hook)]
        return [module.register_forward_hook(ChangedOutput(path, order))]

    def _probe_others(self, paths: Sequence[str]) -> None:
        """Learn in which order modules that factors can't adapt, norms, see the rows."""
        modules = {path: self._base.get_submodule(path) for path in paths}
        widths = {path: next(module.parameters()).shape[-1] for path, module in modules.items()}
        shapes = {path: ModuleShape(kind="linear", in_features=n, out_features=n) for path, n in widths.items()}
        if modules:
            self._other_orders |= probe_rows(self._base, modules, shapes).orders

    def _order_of_any(self, path: str) -> RowOrder:
        return self._other_orders.get(path) or self._order(path)

    def attach_all_plain_linears(self) -> None:
        """Attach a LoRA layer to every plain nn.Linear, so that all of them can decode fast."""
        with self._lock:
            self._attach([path for path in self.paths if can_become_lora_linear(self.modules[path])])

    def _attach(self, paths: Iterable[str]) -> None:
        for path in paths:
            if path in self._attached_paths():
                continue
            if self.shapes[path].is_parameter:
                self._attach_parameter(path)
                continue
            module, index = self.modules[path], self.module_index[path]
            if can_become_lora_linear(module):
                as_class = LoraOutput if path == self.output_module else LoraLinear
                become_lora_linear(module, index, path, self._shared, self._order(path), as_class=as_class)
                self._lora_linears.add(path)
                continue
            layer_class = GatedEmbedding if self.shapes[path].kind == "embedding" else GatedLinear
            self._hooks[path] = layer_class(index, path, self._order(path))
            self._handles[path] = module.register_forward_hook(self._hooks[path], prepend=True)

    def _attach_parameter(self, path: str) -> None:
        module, owner, order = self.modules[path], self._module_path(path), self._order(path)
        if self.shapes[path].kind == "router":
            become_lora_router(module, self.module_index[path], owner, order)
            self._adapted_parameters.add(path)
            return
        siblings = {name: f"{owner}.{name}" for name in parameter_names(module)}
        become_lora_experts(module, owner, {name: self.module_index[p] for name, p in siblings.items()}, order)
        self._adapted_parameters.update(siblings.values())

    def _module_path(self, path: str) -> str:
        return path.rpartition(".")[0] if self.shapes[path].is_parameter else path

    def _order(self, path: str) -> RowOrder:
        return RowOrder.ROWS if self._probe is None else self._probe.orders.get(path, RowOrder.UNKNOWN)

    def _probed(self) -> RowProbe:
        """What a few tokens tell about the modules; they run when the first adapter comes."""
        if self._probe is None:
            self._probe = probe_rows(self._base, self.modules, self.shapes)
            for path in self._lora_linears:
                vars(self.modules[path])["lora_order"] = self._order(path)
            for path, hook in self._hooks.items():
                hook.order = self._order(path)
            for path in self._adapted_parameters:
                vars(self.modules[path])["lora_order"] = self._order(path)
        return self._probe

    def attach_once(self, name: str, attach: Callable[[], Sequence[Removable]]) -> None:
        """Give the base model other hooks, which go when the LoRA layers do; nothing happens if it has them."""
        with self._lock:
            if name not in self._others:
                self._others[name] = attach()

    def check_attached(self, modules: Iterable[int], changed: Iterable[str] = ()) -> None:
        """Raise RequestError if the base model has been given back, and with it the LoRA layers of these modules.

        `changed` are the paths of those whose own weights an adapter changes.
        """
        if not self._was_detached:
            return
        missing = [path for path in (self.paths[i] for i in modules) if path not in self._attached_paths()]
        missing += [path for path in changed if path not in self._changed]
        if missing:
            raise RequestError(
                f"the LoRA layers were detached from the base model, so that adapters have no effect at "
                f"{listed(missing)}. Make a new MultiLoraModel."
            )

    def _attached_paths(self) -> set[str]:
        return {*self._handles, *self._lora_linears, *self._adapted_parameters}

    def attach_output(self) -> None:
        """Attach the output layer's if it rounds logits to 16 bits; under `choosing_tokens` it then doesn't."""
        path = self.output_module
        if path in self.modules and can_become_lora_linear(self.modules[path]) and rounds_logits(self.modules[path]):
            with self._lock:
                self._attach([path])

    def detach(self) -> None:
        """Give the base model back as it was."""
        with self._lock:
            self._was_detached = True
            for handle in (
                handle for all_ in (self._others, self._changed) for some in all_.values() for handle in some
            ):
                handle.remove()
            self._others.clear()
            for handle in self._handles.values():
                handle.remove()
            for path in self._lora_linears:
                become_linear(self.modules[path])
            for module in self._apart:
                join_tokens(module)
            for module in self._reordered:
                restore_first_weight(module)
            self._apart = []
            for module in {self.modules[path] for path in self._adapted_parameters}:
                become_plain_router(module) if isinstance(module, LoraRouter) else become_plain_experts(module)
            self._handles.clear()
            self._changed.clear()
            self._hooks.clear()
            self._lora_linears.clear()
            self._adapted_parameters.clear()
