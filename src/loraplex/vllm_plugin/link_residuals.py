"""Residuals of a link inside vLLM: read, and checked against the base model before anything is changed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from transformers import PreTrainedConfig

from loraplex.errors import CapacityError, UnsupportedAdapterError
from loraplex.layers.attach import AdaptableModel
from loraplex.residual.fingerprint import BaseFingerprint, check_same_base
from loraplex.residual.format_settings import ResidualSettings
from loraplex.residual.gates import GateResidual
from loraplex.residual.intervention_fit import check_intervention_fits
from loraplex.residual.modules import LinkedResidual, check_rank, check_residual_fits
from loraplex.residual.operations import SiteKey
from loraplex.residual.other_formats.pyreft import is_pyreft_folder
from loraplex.residual.reft import Site
from loraplex.residual.rows import ChainLink
from loraplex.residual.sites import BlockSites
from loraplex.residual.sources import read_any_residual
from loraplex.vllm_plugin.model_gates import GateModules
from loraplex.vllm_plugin.options import KEY


@dataclass(frozen=True, kw_only=True)
class ResidualLimits:
    """What residuals find in the base model that vLLM runs."""

    config: PreTrainedConfig
    identity: BaseFingerprint  # without heads
    num_heads: Mapping[int, int]  # of every attention layer, on all workers together
    sites: frozenset[SiteKey]
    gates: GateModules
    num_linked: int  # in one link at most
    linked_layers: Mapping[int, int]  # that have caches for linked residuals: the largest rank there
    device: torch.device

    @property
    def num_blocks(self) -> int:
        return len(self.num_heads)

    def has(self, site: Site, block: int) -> bool:
        """Whether a block has a module at a site that puts out hidden states."""
        return (site, block) in self.sites

    def read(self, path: Path, weight: float) -> ChainLink:
        """One residual of a link, on the device. Raises what is wrong with it."""
        name = path.name
        if is_pyreft_folder(path):
            raise UnsupportedAdapterError(
                f"{str(path)!r} is pyreft's folder, which doesn't say on which tokens it acts. Convert it: loraplex "
                "convert FOLDER OUTPUT --positions f7+l7."
            )
        residual = read_any_residual(path, self.config, check=lambda settings: self._check_settings(name, settings))
        if isinstance(residual, LinkedResidual):
            check_residual_fits(name, residual, self.identity, self.num_heads)
            self._check_linked(name, residual)
        else:
            places = (lambda: cast(BlockSites, self), lambda: cast(AdaptableModel, self.gates))
            check_intervention_fits(name, residual, self.identity, *places)
        if isinstance(residual, GateResidual):
            residual = self.gates.local(residual)
        return ChainLink(name=name, residual=residual.to(self.device), weight=weight)

    def check_chain(self, chain: Sequence[ChainLink]) -> None:
        """Raise CapacityError for more linked residuals than there are caches for."""
        linked = [link.name for link in chain if isinstance(link.residual, LinkedResidual)]
        if len(linked) > self.num_linked:
            raise CapacityError(
                f"the link has {len(linked)} linked residuals ({', '.join(linked)}), and there are caches for "
                f'{self.num_linked}. Start the engine with {{"{KEY}": {{"linked": {len(linked)}}}}}: each takes the '
                "memory of the keys and values of its attention layers once more."
            )

    def _check_settings(self, name: str, settings: ResidualSettings) -> None:
        if settings.base is not None:
            check_same_base(name, settings.base, self.identity)
        check_rank(settings.rank, self.identity.hidden_size)

    def _check_linked(self, name: str, residual: LinkedResidual) -> None:
        missing = sorted(set(residual.layers) - set(self.linked_layers))
        if missing and self.num_linked > 0:
            raise CapacityError(
                f"residual {name!r} has the attention layers {missing}, which have no cache for it. Start the engine "
                f"with {KEY}.attention_layers that name them, or without that option."
            )
        for layer, weights in residual.layers.items():
            if self.num_linked > 0 and weights.rank > self.linked_layers[layer]:
                raise UnsupportedAdapterError(
                    f"residual {name!r} has rank {weights.rank}; inside vLLM its local responses are values of an "
                    f"attention head, which has {self.linked_layers[layer]}. Use loraplex's own engine."
                )
