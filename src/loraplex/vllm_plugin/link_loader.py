"""From the folders of a link to one LoRA of vLLM's."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights

from loraplex.adapters.fit import check_fits
from loraplex.adapters.peft.reader import read_adapter
from loraplex.adapters.weights import Adapter
from loraplex.errors import BaseModelMismatchError, CapacityError, MixtureError, UnsupportedAdapterError
from loraplex.residual.rows import ChainLink
from loraplex.residual.sources import is_residual_source
from loraplex.routers.config import StaticRouterConfig
from loraplex.routers.folder import RouterFolder, is_router_folder, read_router_folder
from loraplex.vllm_plugin.base_modules import BaseModules, LayerIndices
from loraplex.vllm_plugin.catalog import FolderCatalog, Wanted
from loraplex.vllm_plugin.concatenate import LinkMember, concatenate, index_members, total_rank
from loraplex.vllm_plugin.gates import PLAIN, SlotMixture
from loraplex.vllm_plugin.link_residuals import ResidualLimits
from loraplex.vllm_plugin.link_routers import RoutedExperts, make_routing, needs_gates, routed_experts
from loraplex.vllm_plugin.options import KEY, PluginOptions
from loraplex.vllm_plugin.routers import SlotRouting
from loraplex.xlora.formats.folders import is_mixture_folder, read_mixture_folder
from loraplex.xlora.formats.head_tensors import check_head
from loraplex.xlora.formats.mixture_folder import MixtureFolder
from loraplex.xlora.head import ScalingHead


class LinkedLora(LoRAModel):
    """A link as one LoRA of vLLM's: all factors side by side, the mixtures that gate some of their columns, residuals.

    A link of residuals alone is a LoRA of rank 0, which adapts no module.
    """

    def __init__(
        self,
        lora_id: int,
        rank: int,
        loras: dict[str, Any],
        uses: tuple[SlotMixture, ...],
        columns: Tensor | None,
        routing: SlotRouting | None,
        residuals: tuple[ChainLink, ...] = (),
    ) -> None:
        super().__init__(lora_id, rank, loras)
        self.uses = uses
        self.columns = columns  # [rank] int64: the gate column of each rank column; None: no X-LoRA mixture
        self.routing = routing  # None: no mixture with a router
        self.residuals = residuals  # in the link's order


@dataclass(frozen=True, kw_only=True)
class EngineLimits:
    """What the engine has room for."""

    max_rank: int
    dtype: torch.dtype
    device: torch.device
    hidden_size: int


@dataclass(frozen=True)
class _Gated:
    """A mixture of a link, and which of the link's members are its experts."""

    name: str
    folder: MixtureFolder
    weight: float
    members: range


class LinkLoader:
    """Reads the folders of links with loraplex's own readers and checks, and joins them for vLLM."""

    def __init__(
        self,
        catalog: FolderCatalog,
        options: PluginOptions,
        base: BaseModules,
        places: LayerIndices,
        limits: EngineLimits,
        residuals: ResidualLimits | None = None,
    ) -> None:
        """`residuals`: what the engine has for them; None where it serves none."""
        self._residual_limits = residuals
        self._catalog = catalog
        self._options = options
        self._base = base
        self._places = places
        self._limits = limits

    def load(self, lora_id: int, wanted: Wanted) -> LinkedLora:
        """One LoRA for all folders of a link. Raises what is wrong with them, before anything is changed."""
        wanted, residuals = self._residuals(wanted)
        mixtures = {i: read_mixture_folder(folder) for i, (folder, _) in enumerate(wanted) if is_mixture_folder(folder)}
        routers = {i: read_router_folder(folder) for i, (folder, _) in enumerate(wanted) if is_router_folder(folder)}
        self._check_mixtures(list(mixtures.values()), list(routers.values()), wanted)
        members: list[tuple[Adapter, float]] = []
        gated: list[_Gated] = []
        routed: list[tuple[RoutedExperts, range]] = []
        for i, (folder, weight) in enumerate(wanted):
            first = len(members)
            if i in mixtures:
                experts = self._experts(folder, mixtures[i].experts)
                members += [(expert, 1.0) for expert in experts]  # a mixture's weight is in its gates
                gated.append(_Gated(folder.name, mixtures[i], weight, range(first, len(members))))
            elif i in routers:
                mixture = routed_experts(
                    routers[i], weight, self._experts(folder, routers[i].experts), self._base.shapes
                )
                members += mixture.members
                routed.append((mixture, range(first, len(members))))
            else:
                members.append((self._read(folder, folder), weight))
        parts = index_members(members)
        self._check_rank(parts, wanted)
        modules: dict[str, int] = {}
        if gated or needs_gates([mixture for mixture, _ in routed]):
            # In a scaling pass every member must be off, which only gates can do.
            modules = {path: self._places.module(path) for part in parts for path in part.adapter.layers}
        uses, columns = self._uses(gated, parts)
        of_parts = [(mixture, [parts[member] for member in found]) for mixture, found in routed]
        routing = make_routing(of_parts, parts, modules, self._places.num_modules)
        loras = {}
        for path, (lora_a, lora_b) in concatenate(parts, self._limits.dtype).items():
            name = self._places.name(path)
            loras[name] = LoRALayerWeights(name, len(lora_a), len(lora_a), lora_a, lora_b, scaling=1.0)
        return LinkedLora(lora_id, total_rank(parts), loras, uses, columns, routing, residuals)

    def _residuals(self, wanted: Wanted) -> tuple[Wanted, tuple[ChainLink, ...]]:
        """What a link holds besides residuals, and the residuals; both in the link's order."""
        chosen = [(path, weight) for path, weight in wanted if is_residual_source(path)]
        if chosen and self._residual_limits is None:
            raise UnsupportedAdapterError(
                f"{str(chosen[0][0])!r} is a residual, and this engine serves none. Start it with "
                f'{{"{KEY}": {{"residuals": true}}}}, and for linked residuals with {{"{KEY}": {{"linked": 1}}}}.'
            )
        chain = tuple(
            self._residual_limits.read(path, weight) for path, weight in chosen if self._residual_limits is not None
        )
        if self._residual_limits is not None:
            self._residual_limits.check_chain(chain)
        return tuple(pair for pair in wanted if pair not in chosen), chain

    def _experts(self, mixture: Path, experts: Mapping[str, Path | str]) -> list[Adapter]:
        return [self._read(self._catalog.check_expert(mixture, path), mixture) for path in experts.values()]

    def _read(self, folder: Path, named: Path) -> Adapter:
        if is_residual_source(folder):
            raise UnsupportedAdapterError(
                f"{str(folder)!r} is a residual; experts of a mixture are LoRAs. Link it with the mixture."
            )
        adapter = read_adapter(folder, layout=self._base.layout)
        where = f"{str(folder)!r}" if folder == named else f"{str(folder)!r} (an expert of {str(named)!r})"
        if any(weights.magnitude is not None for weights in adapter.layers.values()):
            raise UnsupportedAdapterError(
                f"{where} is a DoRA adapter, which vLLM can't run. Use loraplex's own engine."
            )
        if adapter.config.alora_invocation_tokens is not None:
            raise UnsupportedAdapterError(f"{where} is an aLoRA, which vLLM can't run. Use loraplex's own engine.")
        check_fits(adapter, self._base.shapes, output_module=self._base.output_module)
        return adapter

    def _check_mixtures(
        self, mixtures: Sequence[MixtureFolder], routers: Sequence[RouterFolder], wanted: Wanted
    ) -> None:
        names = ", ".join(folder.name for folder, _ in wanted)
        if mixtures and not self._options.mixtures:
            raise MixtureError(
                f"{names} is or names a mixture, but this engine has no second KV cache for scaling "
                f'passes. Start it with {{"{KEY}": {{"mixtures": true}}}}: every token then takes twice the memory.'
            )
        routed = [folder for folder in routers if not isinstance(folder.config, StaticRouterConfig)]
        if routed and not self._options.routers:
            raise MixtureError(
                f"{names} is or names a mixture with a router in each layer, but this engine has no gates for it. "
                f'Start it with {{"{KEY}": {{"routers": true}}}}.'
            )
        num_experts = sum(mixture.num_experts for mixture in mixtures) + sum(len(r.experts) for r in routed)
        if num_experts > self._options.max_experts:
            raise CapacityError(
                f"the mixtures of this link have {num_experts} experts, but there are gates for "
                f'{self._options.max_experts}. Start the engine with {{"{KEY}": {{"max_experts": {num_experts}}}}}.'
            )
        values = {mixture.config.pass_value(mixture.num_experts) for mixture in mixtures}
        if len(mixtures) > 1 and values != {0.0}:
            raise MixtureError(
                f"the mixtures of this link have the scaling_pass_value {sorted(values)}: each would need a scaling "
                "pass of its own, and there is one second KV cache. Mixtures of one link need the value 0 here."
            )

    def _check_rank(self, parts: Sequence[LinkMember], wanted: Wanted) -> None:
        rank = total_rank(parts)
        if rank > self._limits.max_rank:
            names = ", ".join(folder.name for folder, _ in wanted)
            raise CapacityError(
                f"the adapters of {names} have rank {rank} together, but vLLM's max_lora_rank is "
                f"{self._limits.max_rank}. Start the engine with the next of 8, 16, 32, 64, 128, 256, 320, 512."
            )

    def _uses(
        self, gated: Sequence[_Gated], parts: Sequence[LinkMember]
    ) -> tuple[tuple[SlotMixture, ...], Tensor | None]:
        if not gated:
            return (), None
        columns = torch.full((total_rank(parts),), PLAIN, dtype=torch.int64)
        uses: list[SlotMixture] = []
        first = PLAIN + 1
        for mixture in gated:
            experts = [parts[member] for member in mixture.members]
            for i, part in enumerate(experts):
                columns[part.first : part.first + part.rank] = first + i
            uses.append(
                self._use(mixture.name, mixture.folder, [part.adapter for part in experts], mixture.weight, first)
            )
            first += len(experts)
        return tuple(uses), columns

    def _use(
        self, name: str, mixture: MixtureFolder, experts: Sequence[Adapter], weight: float, first: int
    ) -> SlotMixture:
        adapted = {path for expert in experts for path in expert.layers}
        layers = [path for path in self._base.shapes if path in adapted]  # in registration order
        if mixture.hidden_size != self._limits.hidden_size:
            raise BaseModelMismatchError(
                f"the mixture was made for hidden states of size {mixture.hidden_size}, but this base model's have "
                f"{self._limits.hidden_size}. Load it on the base model that it was trained with."
            )
        size, num_experts = mixture.hidden_size, len(experts)
        check_head(mixture.head, mixture.config, hidden_size=size, num_experts=num_experts, num_layers=len(layers))
        head = ScalingHead(mixture.config, hidden_size=size, num_experts=num_experts, num_layers=len(layers))
        head.load_state_dict({name: tensor.float() for name, tensor in mixture.head.items()})
        layer_of_module = torch.zeros(self._places.num_modules, dtype=torch.int64)
        for layer, path in enumerate(layers):
            layer_of_module[self._places.module(path)] = layer
        return SlotMixture(
            name=name,
            config=mixture.config,
            weight=weight,
            head=head.eval().requires_grad_(False).to(self._limits.device),
            layer_of_module=layer_of_module.to(self._limits.device),
            first_column=first,
        )
