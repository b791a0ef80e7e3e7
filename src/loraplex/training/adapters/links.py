"""Adapters that a job's rows go through besides the one in training: a link whose last adapter learns."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from loraplex.adapters.config import LoraConfig
from loraplex.adapters.fit import check_fits, check_shapes_fit
from loraplex.adapters.peft.hub import resolve_adapter_folder
from loraplex.adapters.peft.reader import read_adapter
from loraplex.adapters.store.slot_weights import SlotWeights
from loraplex.adapters.weights import Adapter, ModuleShape
from loraplex.errors import UnsupportedAdapterError
from loraplex.layers.attach import AdaptableModel
from loraplex.residual.fingerprint import BaseFingerprint, check_same_base
from loraplex.residual.format import is_residual_folder, read_residual
from loraplex.residual.format_settings import ResidualSettings
from loraplex.residual.gates import GateResidual
from loraplex.residual.layers import AttentionLayers
from loraplex.residual.modules import (
    FunctionResidual,
    LinkedResidual,
    SteeringVector,
    check_residual_fits,
)
from loraplex.residual.operations import is_intervention
from loraplex.residual.reft import ReftResidual
from loraplex.residual.rows import ChainLink
from loraplex.training.adapters.config import AdapterJob, LinkMember
from loraplex.training.core.parameters import factors_of, slot_weights


@dataclass(frozen=True, kw_only=True)
class FrozenLora:
    """A LoRA that a job's rows go through and that stays as it is."""

    slot_weights: Mapping[int, SlotWeights]  # by module index
    paths: Sequence[str]  # of the adapted modules
    weight: float


@dataclass(frozen=True, kw_only=True)
class FrozenLink:
    """What stands before the adapter in training, in the order of the link."""

    loras: tuple[FrozenLora, ...] = ()
    chain: tuple[ChainLink, ...] = ()
    digest: str = ""  # of weights and order

    @property
    def paths(self) -> list[str]:
        return [path for lora in self.loras for path in lora.paths]


def with_subtracted(link: FrozenLink, slot_weights: Mapping[int, SlotWeights], paths: Sequence[str]) -> FrozenLink:
    """The link and a copy of a LoRA as it is now, with weight -1."""
    copies = {
        index: replace(own, lora_a=own.lora_a.detach().clone(), lora_b=own.lora_b.detach().clone())
        for index, own in slot_weights.items()
    }
    first = FrozenLora(slot_weights=copies, paths=paths, weight=-1.0)
    return replace(link, loras=(*link.loras, first))


def needs_attention(job: AdapterJob) -> bool:
    """Whether the job's rows go through any residual."""
    return job.residual is not None or any(_is_residual(member) for member, _ in job.after)


def frozen_link(
    job: AdapterJob, adaptable: AdaptableModel, attention: AttentionLayers | None, device: torch.device
) -> FrozenLink:
    """Read and check the adapters of `job.after`. Raises what loading them raises, and UnsupportedAdapterError."""
    loras: list[FrozenLora] = []
    chain: list[ChainLink] = []
    digest = hashlib.sha256()
    for place, (member, weight) in enumerate(job.after):
        name = f"after[{place}] of job {job.name!r}"
        digest.update(f"{place} {weight}".encode())
        if _is_residual(member):
            assert attention is not None, "a residual stands in a link, but the attention layers were not joined"
            residual = _residual(name, member, attention.identity).to(device)
            check_residual_fits(name, residual, attention.identity, attention.num_heads)
            chain.append(ChainLink(name=name, residual=residual, weight=weight))
            _add(digest, residual.tensors())
        else:
            adapter = _lora(name, member, adaptable)
            loras.append(_frozen_lora(adapter, weight, adaptable, device))
            _add(digest, factors_of(adapter.layers))
    return FrozenLink(loras=tuple(loras), chain=tuple(chain), digest=digest.hexdigest() if job.after else "")


def _is_residual(member: LinkMember) -> bool:
    if isinstance(member, str | Path):
        return is_residual_folder(member)
    return not isinstance(member, Adapter)


def _residual(name: str, member: LinkMember, base: BaseFingerprint) -> LinkedResidual | SteeringVector:

    def check(settings: ResidualSettings) -> None:
        if settings.base is not None:
            check_same_base(name, settings.base, base)

    residual = read_residual(member, check=check) if isinstance(member, str | Path) else member
    assert not isinstance(residual, Adapter | FunctionResidual), "AdapterJob takes no such member"
    if isinstance(residual, ReftResidual | GateResidual) or is_intervention(residual):
        raise UnsupportedAdapterError(
            f"{name} acts on blocks or modules, not on attention, which can't stand in a link in training. Use a "
            "linked residual, or a vector on attention at all tokens."
        )
    return residual


def _lora(name: str, member: LinkMember, adaptable: AdaptableModel) -> Adapter:
    def check_shapes(config: LoraConfig, shapes: Mapping[str, ModuleShape]) -> None:
        check_shapes_fit(config, shapes, adaptable.shapes, output_module=adaptable.output_module)

    adapter = (
        read_adapter(resolve_adapter_folder(member), check_shapes=check_shapes, layout=adaptable.layout)
        if isinstance(member, str | Path)
        else member
    )
    assert isinstance(adapter, Adapter), "residuals are told apart before"
    check_fits(adapter, adaptable.shapes, output_module=adaptable.output_module)
    if adapter.config.use_dora or adapter.config.alora_invocation_tokens is not None:
        kind = "DoRA" if adapter.config.use_dora else "aLoRA"
        raise UnsupportedAdapterError(
            f"{name} is a {kind} adapter, which can't stand in a link in training. Use a LoRA."
        )
    if adapter.config.target_parameters:
        raise UnsupportedAdapterError(
            f"{name} adapts parameters of experts or routers (target_parameters), which can't stand in a link in "
            "training. Use an adapter of modules."
        )
    return adapter


def _frozen_lora(adapter: Adapter, weight: float, adaptable: AdaptableModel, device: torch.device) -> FrozenLora:
    factors = [factor.detach().to(device, torch.float32) for factor in factors_of(adapter.layers)]
    weights = slot_weights(adapter.layers, factors, adaptable)
    return FrozenLora(slot_weights=weights, paths=list(adapter.layers), weight=weight)


def _add(digest: "hashlib._Hash", tensors: Iterable[Tensor]) -> None:
    for tensor in tensors:
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
