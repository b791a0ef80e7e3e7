"""From jobs to job states: everything that can be wrong is found before anything is trained."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loraplex.adapters.config import LoraConfig
from loraplex.adapters.fit import check_ranks
from loraplex.adapters.peft.reader import read_adapter
from loraplex.adapters.targets import expected_targets
from loraplex.adapters.weights import Adapter, LoraWeights, ModuleShape
from loraplex.errors import BaseModelMismatchError, ConfigError
from loraplex.layers.attach import AdaptableModel
from loraplex.models.text.end_tokens import training_ends
from loraplex.residual.fingerprint import check_same_base
from loraplex.residual.format import read_residual
from loraplex.residual.format_settings import ResidualSettings
from loraplex.residual.layers import AttentionLayers, base_fingerprint
from loraplex.residual.modules import LinkedResidual, check_rank, check_residual_fits
from loraplex.residual.reft import ReftResidual
from loraplex.residual.sites import BlockSites
from loraplex.training.adapters.config import AdapterJob
from loraplex.training.adapters.data import load_job_data
from loraplex.training.adapters.dora import TrainableDora
from loraplex.training.adapters.job_state import JobState
from loraplex.training.adapters.links import FrozenLink, frozen_link, with_subtracted
from loraplex.training.adapters.parameters import (
    Trainable,
    TrainableLora,
    TrainableResidual,
    fresh_residual,
    fresh_weights,
)
from loraplex.training.adapters.reft import TrainableReft, first_reft
from loraplex.training.adapters.starts import decomposed_weights
from loraplex.training.forward.probe import check_length


def make_states(
    jobs: Sequence[AdapterJob],
    base: PreTrainedModel,
    adaptable: AdaptableModel,
    tokenizer: PreTrainedTokenizerBase,
    attention: AttentionLayers | None = None,  # needed for residuals
    sites: BlockSites | None = None,  # needed for interventions
    *,
    device: torch.device | None = None,  # of the parameters; None: the base model's
) -> list[JobState]:
    """Check every job against the base model and its data, and give it its first weights.

    Raises ConfigError, DatasetError, or what reading an adapter to start from raises.
    """
    jobs = [job if job.lora is None else replace(job, lora=complete_config(job.lora, base)) for job in jobs]
    for job in jobs:
        check_length(job.label, job.steps.max_length, base)
    vocab_size = next(base.get_input_embeddings().parameters()).shape[0]
    device = device or base.device
    parameters = [_parameters(job, base, adaptable, attention, sites, device) for job in jobs]
    links = [
        _link(job, own, frozen_link(job, adaptable, attention, device))
        for job, own in zip(jobs, parameters, strict=True)
    ]
    ends = training_ends(base, tokenizer)
    return [
        JobState(job, load_job_data(job, tokenizer, vocab_size, ends), own, link)
        for job, own, link in zip(jobs, parameters, links, strict=True)
    ]


def _parameters(
    job: AdapterJob,
    base: PreTrainedModel,
    adaptable: AdaptableModel,
    attention: AttentionLayers | None,
    sites: BlockSites | None,
    device: torch.device,
) -> Trainable:
    """What the job trains, with its first weights."""
    if job.reft is not None:
        assert sites is not None, "interventions are trained, but the blocks are not known"
        return TrainableReft(first_reft(job, sites, base_fingerprint(base)), device)
    if job.lora is None:
        assert attention is not None, "a residual is trained, but the attention layers were not joined"
        return TrainableResidual(first_residual(job, attention), device)
    first = first_weights(job, adaptable)
    if job.lora.use_dora:
        return TrainableDora(job.lora, first, adaptable, device)
    return TrainableLora(job.lora, first, adaptable, device, writes_change=job.start != "lora")


def _link(job: AdapterJob, own: Trainable, link: FrozenLink) -> FrozenLink:
    """What the job's rows go through besides its parameters: first weights of the base's own, subtracted, too."""
    return link if job.start == "lora" else with_subtracted(link, own.slot_weights, own.paths)


def complete_config(lora: LoraConfig, base: PreTrainedModel) -> LoraConfig:
    """Fill in what PEFT writes into an adapter's file by itself."""
    return replace(
        lora,
        base_model_name_or_path=lora.base_model_name_or_path or base.config.name_or_path or None,
        task_type=lora.task_type or "CAUSAL_LM",
    )


def first_weights(job: AdapterJob, adaptable: AdaptableModel) -> dict[str, LoraWeights]:
    """Fresh weights, or those of `job.init_from`.

    Raises ConfigError for targets that the base doesn't have.
    """
    lora = job.lora
    assert lora is not None, f"job {job.name!r} trains no LoRA"
    paths = targeted_paths(job, adaptable)
    ranks, scalings = lora.ranks_of(paths), lora.scalings_of(paths)
    check_ranks(ranks, adaptable.shapes)
    _check_linear_only(job, paths, adaptable)
    if job.start != "lora":
        check_ranks({path: 2 * rank for path, rank in ranks.items()}, adaptable.shapes)  # as it is written
        return decomposed_weights(job.start, job.label, adaptable.modules, ranks, scalings)
    if job.init_from is None:
        return fresh_weights(adaptable.shapes, ranks, scalings, job.seed)
    if isinstance(job.init_from, LinkedResidual | ReftResidual):
        raise ConfigError(f"job {job.name!r}: it trains a LoRA, but init_from is a residual. Set `residual` or `reft`.")
    adapter = job.init_from if isinstance(job.init_from, Adapter) else _read_start(job, adaptable)
    _check_start(job.name, adapter, adaptable, ranks, scalings, use_dora=lora.use_dora)
    return {path: adapter.layers[path] for path in paths}


def _check_linear_only(job: AdapterJob, paths: Sequence[str], adaptable: AdaptableModel) -> None:
    """Raise ConfigError where the job would train an embedding in a way that embeddings don't have."""
    assert job.lora is not None, f"job {job.name!r} trains no LoRA"
    embeddings = [path for path in paths if adaptable.shapes[path].kind == "embedding"]
    what = "use_dora" if job.lora.use_dora else "lora_plus_ratio" if job.lora_plus_ratio != 1 else None
    if embeddings and what is not None:
        raise ConfigError(
            f"{job.label}: {what} is set, and it adapts the embedding {embeddings[0]!r}, which is trained without it "
            f"only. Leave it out of target_modules, or leave {what} out."
        )


def _read_start(job: AdapterJob, adaptable: AdaptableModel) -> Adapter:
    """The adapter in a folder; one for modules of other shapes is refused before its weights are read."""

    def check_shapes(config: LoraConfig, shapes: Mapping[str, ModuleShape]) -> None:
        for path, shape in shapes.items():
            if path in adaptable.shapes:
                _check_shape(job.name, path, shape, adaptable.shapes[path])
        check_ranks(config.ranks_of(tuple(shapes)), shapes)

    assert isinstance(job.init_from, str | Path), "only folders are read"
    return read_adapter(job.init_from, check_shapes=check_shapes, layout=adaptable.layout)


def targeted_paths(job: AdapterJob, adaptable: AdaptableModel) -> list[str]:
    """The modules that the job adapts. Raises ConfigError where a target names none."""
    lora = job.lora
    assert lora is not None, f"job {job.name!r} trains no LoRA"
    targets = lora.target_modules
    paths = expected_targets(lora, adaptable.shapes, output_module=adaptable.output_module)
    known = sorted({path.rsplit(".", 1)[-1] for path, shape in adaptable.shapes.items() if not shape.is_parameter})
    if isinstance(targets, tuple):
        for target in targets:
            alone = replace(
                lora,
                target_modules=(target,),
                exclude_modules=None,
                layers_to_transform=None,
                layers_pattern=None,
            )
            if not expected_targets(alone, adaptable.shapes, output_module=adaptable.output_module):
                raise ConfigError(
                    f"job {job.name!r}: target_modules has {target!r}, which the base model doesn't have. It "
                    f"has {known}."
                )
    if not paths:
        raise ConfigError(
            f"job {job.name!r}: its targets ({targets!r}, with the excluded modules and layers) match no "
            f"module of the base model, which has {known}."
        )
    return paths


def first_residual(job: AdapterJob, attention: AttentionLayers) -> LinkedResidual:
    """Fresh weights, or those of `job.init_from`. Raises ConfigError for layers that the base doesn't have."""
    config = job.residual
    assert config is not None, "a job trains one of the two"
    layers = tuple(attention.layers) if config.layers is None else config.layers
    unknown = [layer for layer in layers if layer not in attention.layers]
    if unknown:
        raise ConfigError(
            f"job {job.name!r}: residual.layers has {unknown}, but the base model has the attention layers "
            f"{min(attention.layers)} to {max(attention.layers)}."
        )
    check_rank(config.r, attention.identity.hidden_size)
    if job.init_from is None:
        return fresh_residual(config, attention.identity, layers, job.seed)

    def check(settings: ResidualSettings) -> None:
        if settings.base is not None:
            check_same_base(job.name, settings.base, attention.identity)

    start = read_residual(job.init_from, check=check) if isinstance(job.init_from, str | Path) else job.init_from
    if not isinstance(start, LinkedResidual):
        raise ConfigError(f"job {job.name!r}: init_from is no linked residual. Give a folder that one was written to.")
    check_residual_fits(job.name, start, attention.identity, attention.num_heads)
    if (start.config.r, start.config.alpha, tuple(start.layers)) != (config.r, config.alpha, layers):
        raise ConfigError(
            f"job {job.name!r}: init_from has r={start.config.r}, alpha={start.config.alpha} and the layers "
            f"{list(start.layers)}; the job has r={config.r}, alpha={config.alpha} and {list(layers)}. Use the same."
        )
    return start


def _check_start(
    name: str,
    adapter: Adapter,
    adaptable: AdaptableModel,
    ranks: dict[str, int],
    scalings: dict[str, float],
    *,
    use_dora: bool,
) -> None:
    """Raise unless the adapter to start from has what the job trains: modules, shapes, ranks and LoRA scalings."""
    if adapter.config.use_dora != use_dora:
        raise ConfigError(
            f"job {name!r}: use_dora is {use_dora}, but init_from has use_dora={adapter.config.use_dora}. Use the "
            "adapter's own LoraConfig: read_adapter(folder).config."
        )
    if adapter.layers.keys() != ranks.keys():
        different = sorted(adapter.layers.keys() ^ ranks.keys())
        raise ConfigError(
            f"job {name!r}: init_from adapts other modules than target_modules names; they differ in "
            f"{different[:3]} ({len(different)} in all). Use the adapter's own LoraConfig: "
            "read_adapter(folder).config."
        )
    for path, weights in adapter.layers.items():
        _check_shape(name, path, weights.shape, adaptable.shapes[path])
        if (weights.rank, weights.scaling) != (ranks[path], scalings[path]):
            raise ConfigError(
                f"job {name!r}: init_from has rank {weights.rank} and LoRA scaling {weights.scaling} at "
                f"{path!r}, the job {ranks[path]} and {scalings[path]}. Use the adapter's own "
                "LoraConfig: read_adapter(folder).config."
            )


def _check_shape(name: str, path: str, shape: ModuleShape, module: ModuleShape) -> None:
    found = (shape.kind, shape.in_features, shape.out_features)
    if shape != module:
        raise BaseModelMismatchError(
            f"job {name!r}: init_from is for another base model: {path!r} is {found} there and "
            f"{(module.kind, module.in_features, module.out_features)} here."
        )
