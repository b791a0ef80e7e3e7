"""From jobs to job states: everything that can be wrong is found before anything is trained."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loraplex.adapters.config import LoraConfig
from loraplex.adapters.peft_folder import read_adapter
from loraplex.adapters.targets import expected_targets
from loraplex.adapters.weights import Adapter, LoraWeights
from loraplex.errors import BaseModelMismatchError, ConfigError, UnsupportedAdapterError
from loraplex.layers.injection import AdaptableModel
from loraplex.layers.modules import embed_scale
from loraplex.training.config import AdapterJob
from loraplex.training.dataset import load_job_data
from loraplex.training.job_state import JobState
from loraplex.training.parameters import fresh_weights


def make_states(
    jobs: Sequence[AdapterJob],
    base: PreTrainedModel,
    adaptable: AdaptableModel,
    tokenizer: PreTrainedTokenizerBase,
) -> list[JobState]:
    """Check every job against the base model and its data, and give it its first weights.

    Raises ConfigError, DatasetError, or what reading an adapter to start from raises.
    """
    jobs = [replace(job, lora=complete_config(job.lora, base)) for job in jobs]
    for job in jobs:
        _check_length(job, base)
    vocab_size = next(base.get_input_embeddings().parameters()).shape[0]
    weights = [first_weights(job, adaptable) for job in jobs]
    scales = {path: embed_scale(module) for path, module in adaptable.modules.items()}
    return [
        JobState(
            job,
            load_job_data(job, tokenizer, vocab_size),
            layers,
            adaptable.module_index,
            {path: scales[path] for path, layer in layers.items() if layer.kind == "embedding"},
            base.device,
        )
        for job, layers in zip(jobs, weights, strict=True)
    ]


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
    paths = targeted_paths(job, adaptable)
    ranks = {path: job.lora.rank_of(path) for path in paths}
    scalings = {path: job.lora.scaling_of(path) for path in paths}
    if job.init_from is None:
        return fresh_weights(adaptable.shapes, ranks, scalings, job.seed)
    adapter = job.init_from if isinstance(job.init_from, Adapter) else read_adapter(Path(job.init_from))
    _check_start(job, adapter, adaptable, ranks)
    return {path: adapter.layers[path] for path in paths}


def targeted_paths(job: AdapterJob, adaptable: AdaptableModel) -> list[str]:
    """The modules that the job adapts. Raises ConfigError where a target names none."""
    targets = job.lora.target_modules
    paths = expected_targets(job.lora, adaptable.shapes, output_module=adaptable.output_module)
    known = sorted({path.rsplit(".", 1)[-1] for path in adaptable.shapes})
    if isinstance(targets, tuple):
        for target in targets:
            alone = replace(
                job.lora,
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


def _check_start(job: AdapterJob, adapter: Adapter, adaptable: AdaptableModel, ranks: dict[str, int]) -> None:
    """Raise unless the adapter to start from has what the job trains: modules, shapes, ranks and LoRA scalings."""
    if adapter.config.use_dora:
        raise UnsupportedAdapterError(f"job {job.name!r}: init_from is a DoRA adapter, which can't be trained here.")
    if adapter.layers.keys() != ranks.keys():
        different = sorted(adapter.layers.keys() ^ ranks.keys())
        raise ConfigError(
            f"job {job.name!r}: init_from adapts other modules than target_modules names; they differ in "
            f"{different[:3]} ({len(different)} in all). Use the adapter's own LoraConfig: "
            "read_adapter(folder).config."
        )
    for path, weights in adapter.layers.items():
        module = adaptable.shapes[path]
        found = (weights.kind, weights.lora_a.shape[1], weights.lora_b.shape[1])
        if found != (module.kind, module.in_features, module.out_features):
            raise BaseModelMismatchError(
                f"job {job.name!r}: init_from is for another base model: {path!r} is {found} there and "
                f"{(module.kind, module.in_features, module.out_features)} here."
            )
        if (weights.rank, weights.scaling) != (ranks[path], job.lora.scaling_of(path)):
            raise ConfigError(
                f"job {job.name!r}: init_from has rank {weights.rank} and LoRA scaling {weights.scaling} at "
                f"{path!r}, the job {ranks[path]} and {job.lora.scaling_of(path)}. Use the adapter's own "
                "LoraConfig: read_adapter(folder).config."
            )


def _check_length(job: AdapterJob, base: PreTrainedModel) -> None:
    longest = getattr(base.config, "max_position_embeddings", None)
    if longest is not None and job.max_length > longest:
        raise ConfigError(
            f"job {job.name!r}: max_length is {job.max_length}, but the base model has {longest} positions. Lower it."
        )
