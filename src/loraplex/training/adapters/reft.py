"""LoReFT in training: interventions h + R^T (W h + b - R h) whose R keeps orthogonal rows (arXiv 2404.03592)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from loraplex.adapters.store.slot_weights import SlotWeights
from loraplex.errors import ConfigError
from loraplex.residual.fingerprint import BaseFingerprint, check_same_base
from loraplex.residual.format import read_residual, write_residual
from loraplex.residual.format_settings import ResidualSettings
from loraplex.residual.modules import LinkedResidual, check_rank
from loraplex.residual.operations import ChainOperations, SiteKey
from loraplex.residual.reft import Intervention, ReftConfig, ReftResidual
from loraplex.residual.rows import ChainLink
from loraplex.residual.sites import BlockSites
from loraplex.training.adapters.config import AdapterJob
from loraplex.training.core.parameters import FlatTensors
from loraplex.training.core.rng import Purpose, generator
from loraplex.training.core.rotation import orthogonal_columns, reflections_of

_ORTHOGONAL = 1e-3  # how far R R^T of an intervention to start from may be from the identity


class TrainableReft:
    """LoReFT interventions in training; those of all blocks side by side."""

    paths: Sequence[str] = ()
    residual: LinkedResidual | None = None

    def __init__(self, first: ReftResidual, device: torch.device) -> None:
        own = first.interventions
        self.rank = own[0].rank
        self.slot_weights: Mapping[int, SlotWeights] = {}
        self._first = first
        columns = torch.stack([one.r for one in own]).float().mT  # [blocks, hidden, rank]
        factors, signs = reflections_of(columns.contiguous())
        self._signs = signs.to(device)
        tensors = FlatTensors(
            [factors, torch.stack([one.w for one in own]), torch.stack([one.b for one in own])], device
        )
        self.flat = tensors.flat
        self._factors, self._w, self._b = tensors.views

    @property
    def sites(self) -> list[SiteKey]:
        """Where they act."""
        return [(one.site, one.block) for one in self._first.interventions]

    def interventions(self) -> ReftResidual:
        """As they are now, part of the graph that leads to the parameters."""
        rotations = orthogonal_columns(self._factors, self._signs).mT  # [blocks, rank, hidden]
        parts = zip(self._first.interventions, rotations, self._w, self._b, strict=True)
        return replace(self._first, interventions=tuple(replace(one, r=r, w=w, b=b) for one, r, w, b in parts))

    def operations(self, name: str) -> ChainOperations:
        """What rows go through."""
        return ChainOperations((ChainLink(name=name, residual=self.interventions()),))

    @torch.no_grad()
    def write(self, folder: Path, end_tokens: tuple[int, ...]) -> None:
        """Write the interventions as they are now."""
        write_residual(replace(self.interventions(), end_tokens=end_tokens), folder, overwrite=True)


def first_reft(job: AdapterJob, sites: BlockSites, identity: BaseFingerprint) -> ReftResidual:
    """Fresh weights, or those of `job.init_from`. Raises ConfigError for blocks that the base doesn't have."""
    config = job.reft
    assert config is not None, f"job {job.name!r} trains no interventions"
    blocks = tuple(range(sites.num_blocks)) if config.layers is None else config.layers
    unknown = [block for block in blocks if not 0 <= block < sites.num_blocks]
    if unknown:
        raise ConfigError(
            f"job {job.name!r}: reft.layers has {unknown}, but the base model has the blocks 0 to "
            f"{sites.num_blocks - 1}."
        )
    check_rank(config.r, sites.hidden_size)
    if config.r > sites.hidden_size:
        raise ConfigError(
            f"job {job.name!r}: reft.r is {config.r}; orthogonal rows of hidden size {sites.hidden_size} are no more "
            "than that."
        )
    if job.init_from is None:
        return _fresh(config, sites.hidden_size, blocks, identity, job.seed)
    return _start(job, config, blocks, identity)


def _fresh(
    config: ReftConfig, hidden_size: int, blocks: Sequence[int], identity: BaseFingerprint, seed: int
) -> ReftResidual:
    """pyreft's first weights: R orthogonal, W and b as of a linear module."""
    draw = generator(seed, Purpose.WEIGHTS)
    bound = hidden_size**-0.5

    def uniform(*shape: int) -> Tensor:
        return torch.empty(shape).uniform_(-bound, bound, generator=draw)

    own = []
    for block in blocks:
        columns, triangle = torch.linalg.qr(torch.randn(hidden_size, config.r, generator=draw))
        r = (columns * triangle.diagonal().sign()).mT.contiguous()
        w, b = uniform(config.r, hidden_size), uniform(config.r)
        own.append(Intervention(block=block, positions=config.positions, r=r, w=w, b=b))
    return ReftResidual(interventions=tuple(own), base=identity)


def _start(job: AdapterJob, config: ReftConfig, blocks: Sequence[int], identity: BaseFingerprint) -> ReftResidual:
    """The interventions of `job.init_from`, which have what the job trains. Raises ConfigError."""

    def check(settings: ResidualSettings) -> None:
        if settings.base is not None:
            check_same_base(job.name, settings.base, identity)

    start = read_residual(job.init_from, check=check) if isinstance(job.init_from, str | Path) else job.init_from
    if not isinstance(start, ReftResidual):
        raise ConfigError(f"job {job.name!r}: init_from has no ReFT interventions. Give a folder of LoReFT.")
    wanted = [(block, "block", config.positions, config.r, True) for block in blocks]
    found = [(one.block, one.site, one.positions, one.rank, one.subtracts) for one in start.interventions]
    if found != wanted:
        raise ConfigError(
            f"job {job.name!r}: init_from has other interventions than the job, which trains LoReFT of rank {config.r} "
            f"at {config.positions} behind the blocks {list(blocks)}. Use the same settings."
        )
    for one in start.interventions:
        off = (one.r.float() @ one.r.float().mT - torch.eye(one.rank)).abs().max()
        if not off < _ORTHOGONAL:
            raise ConfigError(
                f"job {job.name!r}: R of init_from at block {one.block} has no orthogonal rows (off by {off:.2g}), as "
                "NoReFT's; LoReFT is trained here."
            )
    return replace(start, base=start.base or identity)
