"""vLLM's manager of LoRA slots, with gates for mixtures, and right for base rows on a CPU."""

from typing import Any

from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.lora.layers import LoRAMapping
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.layers.row_parallel_linear import RowParallelLinearWithLoRA, RowParallelLinearWithShardedLoRA
from vllm.lora.model_manager import LRUCacheLoRAModelManager

from loraplex.errors import CompatibilityError, UnsupportedEngineError
from loraplex.vllm_plugin.base_modules import LayerIndices
from loraplex.vllm_plugin.compat import require_attributes
from loraplex.vllm_plugin.gates import BatchGates, GateBuffers
from loraplex.vllm_plugin.layer_view import LayerView, gate_expansion, passes_keywords_on
from loraplex.vllm_plugin.link_loader import LinkedLora
from loraplex.vllm_plugin.options import PluginOptions
from loraplex.vllm_plugin.routers import RouterBuffers, Routers
from loraplex.vllm_plugin.slot_routers import SlotRouters


class LinkModelManager(LRUCacheLoRAModelManager):
    """Keeps the gates' buffers in step with the slots."""

    def __init__(self, *, options: PluginOptions, **kwargs: Any) -> None:
        self._spare_slots = 0
        self.gates: BatchGates | None = None
        self.routers: Routers | None = None
        super().__init__(**kwargs)
        require_attributes(self, ("lora_index_to_id", "packed_modules", "modules", "punica_wrapper_mapping"))
        mapper = getattr(self.model, "hf_to_vllm_mapper", None)
        mapper = None if mapper is None else mapper.get_rename_mapper()
        self.places = LayerIndices(self.modules, self.packed_modules, mapper)
        if options.mixtures or options.routers:
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
        if not is_new:
            return is_new
        lora, slot = self._registered_adapters[lora_id], self.lora_index_to_id.index(lora_id)
        linked = lora if isinstance(lora, LinkedLora) else None
        if self.gates is not None:
            self.gates.set_slot(slot, linked.uses if linked else (), linked.columns if linked else None)
        if self.routers is not None:
            self.routers.set_slot(slot, linked.routing if linked else None)
        return is_new

    def set_adapter_mapping(self, mapping: LoRAMapping) -> None:
        super().set_adapter_mapping(mapping)
        if self.gates is None and self.routers is None:
            return
        slot_of_id = {lora_id: slot for slot, lora_id in enumerate(self.lora_index_to_id) if lora_id is not None}
        slots = [slot_of_id[lora_id] if lora_id > 0 else -1 for lora_id in mapping.index_mapping]
        if self.gates is not None:
            self.gates.set_tokens(slots)
        if self.routers is not None:
            self.routers.set_tokens(slots)

    def remove_all_adapters(self) -> None:
        super().remove_all_adapters()
        if self.gates is not None:
            self.gates.forget_batch()
        if self.routers is not None:
            self.routers.forget_batch()

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
        if not passes_keywords_on(type(self.wrapper)):
            raise CompatibilityError(f"{type(self.wrapper).__name__}.add_lora_linear no longer passes its keywords on.")
        sizes = {
            "num_modules": self.places.num_modules,
            "max_tokens": self.max_num_batched_tokens,
            "max_experts": options.max_experts,
            "num_slots": self.lora_slots,
            "max_rank": self.lora_config.max_lora_rank,
        }
        buffers = GateBuffers(**sizes, device=self.device) if options.mixtures else None
        if options.routers:
            is_cpu = self.device.type == "cpu"
            self.routers = (
                SlotRouters(max_rank=sizes["max_rank"]) if is_cpu else RouterBuffers(**sizes, device=self.device)
            )
        self.gates = None if buffers is None else BatchGates(buffers)
        gate_expansion(self.wrapper, buffers, self.routers)
        for name, layer in self.modules.items():
            if isinstance(layer, BaseLinearLayerWithLoRA):
                sum_ranks = tensor_model_parallel_all_reduce if has_partial_values(layer) else None
                layer.set_mapping(LayerView(self.wrapper, self.places.first[name], sum_ranks))


def has_partial_values(layer: BaseLinearLayerWithLoRA) -> bool:
    """Whether each tensor-parallel rank has a part of the values in rank space that its layer expands.

    A row-parallel layer's input is sharded; a fully sharded one adds the values up before it expands them.
    """
    is_row_parallel = isinstance(layer, RowParallelLinearWithLoRA)
    return is_row_parallel and not isinstance(layer, RowParallelLinearWithShardedLoRA) and layer.tp_size > 1
