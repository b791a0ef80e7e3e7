"""vLLM's manager of LoRA slots, with gates for mixtures and residuals, and right for base rows on a CPU."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from transformers import PreTrainedConfig
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.lora.layers import LoRAMapping
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.layers.row_parallel_linear import RowParallelLinearWithLoRA, RowParallelLinearWithShardedLoRA
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import LRUCacheLoRAModelManager

from loraplex.errors import CompatibilityError, UnsupportedEngineError
from loraplex.residual.fingerprint import BaseFingerprint
from loraplex.vllm_plugin.attention_reader import AttentionReader
from loraplex.vllm_plugin.base_modules import BaseModules, LayerIndices
from loraplex.vllm_plugin.batch_residuals import BatchResiduals
from loraplex.vllm_plugin.compat import require_attributes
from loraplex.vllm_plugin.gates import BatchGates, GateBuffers
from loraplex.vllm_plugin.layer_view import LayerView, gate_expansion, passes_keywords_on
from loraplex.vllm_plugin.link_loader import LinkedLora
from loraplex.vllm_plugin.link_residuals import ResidualLimits
from loraplex.vllm_plugin.model_blocks import LinkedCaches, ModelBlocks
from loraplex.vllm_plugin.model_gates import GateModules
from loraplex.vllm_plugin.options import PluginOptions
from loraplex.vllm_plugin.routers import RouterBuffers, Routers
from loraplex.vllm_plugin.slot_routers import SlotRouters


class LinkModelManager(LRUCacheLoRAModelManager):
    """Keeps the gates' buffers in step with the slots."""

    def __init__(self, *, options: PluginOptions, **kwargs: Any) -> None:
        self._spare_slots = 0
        self.gates: BatchGates | None = None
        self.routers: Routers | None = None
        self.residuals: BatchResiduals | None = None
        self._blocks: ModelBlocks | None = None
        self._linked: LinkedCaches | None = None
        self.reader: AttentionReader | None = None
        self._options = options
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

    def _create_merged_loras_inplace(self, lora_model: LoRAModel) -> None:
        """Pack a LoRA's layers as vLLM's are packed; a link of residuals alone has none."""
        if lora_model.loras:
            super()._create_merged_loras_inplace(lora_model)

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
        if self.residuals is not None:
            self.residuals.set_slot(slot, linked.residuals if linked else ())
        return is_new

    def set_adapter_mapping(self, mapping: LoRAMapping) -> None:
        super().set_adapter_mapping(self._without_empty(mapping))
        if self.gates is None and self.routers is None and self.residuals is None:
            return
        slot_of_id = {lora_id: slot for slot, lora_id in enumerate(self.lora_index_to_id) if lora_id is not None}
        slots = [slot_of_id[lora_id] if lora_id > 0 else -1 for lora_id in mapping.index_mapping]
        if self.gates is not None:
            self.gates.set_tokens(slots)
        if self.routers is not None:
            self.routers.set_tokens(slots)
        if self.residuals is not None:
            self.residuals.set_tokens(slots)

    def _without_empty(self, mapping: LoRAMapping) -> LoRAMapping:
        """Tokens of links of residuals alone have no LoRA to compute."""
        registered = self._registered_adapters.cache
        empty = {
            lora_id
            for lora_id in set(mapping.index_mapping)
            if isinstance(lora := registered.get(lora_id), LinkedLora) and lora.rank == 0
        }
        if not empty:
            return mapping
        index, prompts = (
            tuple(0 if lora_id in empty else lora_id for lora_id in ids)
            for ids in (mapping.index_mapping, mapping.prompt_mapping)
        )
        return replace(mapping, index_mapping=index, prompt_mapping=prompts)

    def remove_all_adapters(self) -> None:
        super().remove_all_adapters()
        if self.gates is not None:
            self.gates.forget_batch()
        if self.routers is not None:
            self.routers.forget_batch()
        if self.residuals is not None:
            self.residuals.forget_batch()

    def may_be_gated(self, lora_id: int) -> bool:
        """Whether tokens of this adapter may go through mixtures: known ones, and those that aren't loaded yet."""
        lora = self._registered_adapters.cache.get(lora_id)
        return lora is None or (isinstance(lora, LinkedLora) and bool(lora.uses))

    def serve_residuals(self, registry: Any, attention: Mapping[str, Any]) -> None:
        """Let blocks go through what is asked for; `attention` are the registry's layers, without copies."""
        self._blocks = ModelBlocks(self.model, attention)
        self.residuals = BatchResiduals(self._blocks.heads)
        options = self._options
        if options.linked:
            self._linked = LinkedCaches(registry, self._blocks, options.linked, options.attention_layers)
        self._blocks.attach(self.residuals, self._linked)
        if options.attention:
            self.reader = AttentionReader(registry, self._blocks, self._blocks.chosen(options.attention_layers))
            self.reader.attach()

    def residual_limits(self, config: PreTrainedConfig, base: BaseModules) -> ResidualLimits | None:
        """What residuals find here, on a base model of transformers' class; None where none are served."""
        if self._blocks is None or self.residuals is None or not self._options.has_residuals:
            return None
        layers = {name: layer for name, layer in self.modules.items() if isinstance(layer, BaseLinearLayerWithLoRA)}
        gates = GateModules(layers, self.packed_modules, self.places.name, base.shapes, base.output_module)
        gates.attach(self.residuals)
        identity = BaseFingerprint(
            architecture=base.architecture,
            hidden_size=config.get_text_config(decoder=True).hidden_size,
            vocab_size=config.get_text_config(decoder=True).vocab_size,
            num_heads=tuple(self._blocks.num_heads.values()),
        )
        return ResidualLimits(
            config=config,
            identity=identity,
            num_heads=self._blocks.num_heads,
            sites=self._blocks.sites,
            gates=gates,
            num_linked=self._options.linked,
            linked_layers={} if self._linked is None else self._linked.layers,
            device=self.device,
        )

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
