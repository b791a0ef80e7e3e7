"""vLLM's manager of LoRA slots, with gates for mixtures, and right for base rows on a CPU."""

from typing import Any

from vllm.lora.layers import LoRAMapping
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.model_manager import LRUCacheLoRAModelManager

from loraplex.errors import CompatibilityError, UnsupportedEngineError
from loraplex.vllm_plugin.base_modules import LayerIndices
from loraplex.vllm_plugin.compat import require_attributes
from loraplex.vllm_plugin.gates import BatchGates, GateBuffers
from loraplex.vllm_plugin.layer_view import LayerView, gate_expansion, passes_keywords_on
from loraplex.vllm_plugin.link_loader import LinkedLora
from loraplex.vllm_plugin.options import PluginOptions


class LinkModelManager(LRUCacheLoRAModelManager):
    """Keeps the gates' buffers in step with the slots."""

    def __init__(self, *, options: PluginOptions, **kwargs: Any) -> None:
        self._spare_slots = 0
        self.gates: BatchGates | None = None
        super().__init__(**kwargs)
        require_attributes(self, ("lora_index_to_id", "packed_modules", "modules", "punica_wrapper_mapping"))
        mapper = getattr(self.model, "hf_to_vllm_mapper", None)
        mapper = None if mapper is None else mapper.get_rename_mapper()
        self.places = LayerIndices(self.modules, self.packed_modules, mapper)
        if options.mixtures:
            self._gate_layers(options)

    @property
    def lora_slots(self) -> int:
        """The slots for adapters; while layers are made, one more on a CPU."""
        return super().lora_slots + self._spare_slots

    def _create_lora_modules(self) -> None:
        """Make the LoRA layers, on a CPU with one slot more than is ever filled.

        vLLM's CPU operators take a token without adapter, whose slot is -1, for one of the last slot. That one stays
        zero.
        """
        self._spare_slots = 1 if self.device.type == "cpu" else 0
        try:
            super()._create_lora_modules()
        finally:
            self._spare_slots = 0

    def activate_adapter(self, lora_id: int) -> bool:
        is_new = super().activate_adapter(lora_id)
        if is_new and self.gates is not None:
            lora = self._registered_adapters[lora_id]
            uses, columns = (lora.uses, lora.columns) if isinstance(lora, LinkedLora) else ((), None)
            self.gates.set_slot(self.lora_index_to_id.index(lora_id), uses, columns)
        return is_new

    def set_adapter_mapping(self, mapping: LoRAMapping) -> None:
        super().set_adapter_mapping(mapping)
        if self.gates is not None:
            slot_of_id = {lora_id: slot for slot, lora_id in enumerate(self.lora_index_to_id) if lora_id is not None}
            self.gates.set_tokens([slot_of_id[lora_id] if lora_id > 0 else -1 for lora_id in mapping.index_mapping])

    def remove_all_adapters(self) -> None:
        super().remove_all_adapters()
        if self.gates is not None:
            self.gates.forget_batch()

    def may_be_gated(self, lora_id: int) -> bool:
        """Whether tokens of this adapter may go through mixtures: known ones, and those that aren't loaded yet."""
        lora = self._registered_adapters.cache.get(lora_id)
        return lora is None or (isinstance(lora, LinkedLora) and bool(lora.uses))

    @property
    def wrapper(self) -> Any:
        """The one Punica wrapper of a model that only reads text."""
        return next(iter(self.punica_wrapper_mapping.values()))

    def _gate_layers(self, options: PluginOptions) -> None:
        if self.supports_mm:
            raise UnsupportedEngineError(
                f"{type(self.model).__name__} reads more than text; mixtures are not known to be right there. Serve it "
                "without mixtures."
            )
        if self._is_moe:
            raise UnsupportedEngineError(
                f"{type(self.model).__name__} is a mixture-of-experts model; X-LoRA is not known to be right there. "
                "Serve it without mixtures."
            )
        buffers = GateBuffers(
            num_modules=self.places.num_modules,
            max_tokens=self.max_num_batched_tokens,
            max_experts=options.max_experts,
            num_slots=self.lora_slots,
            max_rank=self.lora_config.max_lora_rank,
            device=self.device,
        )
        if not passes_keywords_on(type(self.wrapper)):
            raise CompatibilityError(f"{type(self.wrapper).__name__}.add_lora_linear no longer passes its keywords on.")
        gate_expansion(self.wrapper, buffers)
        for name, layer in self.modules.items():
            if isinstance(layer, BaseLinearLayerWithLoRA):
                layer.set_mapping(LayerView(self.wrapper, self.places.first[name]))
        self.gates = BatchGates(buffers)
