"""train_adapters: many LoRA adapters at once on one frozen base model, in one batch."""

import logging
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loraplex.adapters.peft.push import check_can_push, push_adapter, repo_of
from loraplex.errors import ConfigError, RemoteError, TrainingError
from loraplex.layers.attach import AdaptableModel
from loraplex.layers.quantized.training import quantized_modules_train
from loraplex.models.checkpoints.loading import refuse_injected_adapters
from loraplex.models.checkpoints.quantized_base import check_quantized_base
from loraplex.models.multi_lora import MultiLoraModel
from loraplex.residual.registry import LinkedAttention
from loraplex.training.adapters.centroids import write_centroids
from loraplex.training.adapters.config import AdapterJob, check_jobs
from loraplex.training.adapters.job_state import JobState, run_fingerprint
from loraplex.training.adapters.links import needs_attention
from loraplex.training.adapters.model_card import write_card
from loraplex.training.adapters.reft import TrainableReft
from loraplex.training.adapters.setup import make_states
from loraplex.training.adapters.sharded import check_sharded
from loraplex.training.adapters.task import AdapterTask
from loraplex.training.core.config import TrainConfig
from loraplex.training.core.distributed import ProcessGroup
from loraplex.training.core.outputs import check_outputs
from loraplex.training.core.results import TrainResult
from loraplex.training.core.run import run_task
from loraplex.training.core.sharding import shard_base
from loraplex.training.forward.probe import check_trainable_base

logger = logging.getLogger(__name__)

_AFTER_DIVERGENCE = (
    "In a run with the same output folder, a job that diverged begins anew with its new settings, or may be left "
    "out; the others are kept."
)


def train_adapters(
    model: MultiLoraModel | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    jobs: Sequence[AdapterJob],
    config: TrainConfig,
) -> list[TrainResult]:
    """Train one adapter, LoRA, linked residual or LoReFT, for each job; the rows of all jobs share the forward passes.

    Each job trains as if alone: gradients reach only a row's own adapter. Job `name` leaves
    `<output>/<name>/` (the adapter in its format), `<output>/<name>.jsonl` (its log) and
    `<output>/<name>.png` (its losses), and in a LoRA's folder its prompts' centroid; the run leaves
    `<output>/checkpoint.safetensors`, from which it goes on after a kill exactly where it would have been.

    Everything is checked before the first step. Raises ConfigError, DatasetError, UnsupportedAdapterError,
    BaseModelError, CheckpointError (the checkpoint is of another run), AdapterExistsError (an adapter is in
    the output folder but no checkpoint) and OutputError (no room, or somebody else's file is in the way). A job whose
    loss, gradients or weights are no longer finite is stopped, and its last good weights are written to
    `<output>/<name>.diverged/`; when the others are done, TrainingError names it, and its `results` are what would have
    been returned.
    """
    jobs = list(jobs)
    check_jobs(jobs)
    _check_push(jobs, config)
    check_outputs(Path(config.output), [job.name for job in jobs], _inputs(jobs))
    if not isinstance(model, MultiLoraModel):
        refuse_injected_adapters(model)
        check_quantized_base(model)
    base = model.base if isinstance(model, MultiLoraModel) else model.eval().requires_grad_(False)
    with quantized_modules_train(base):
        return _train(model, base, tokenizer, jobs, config)


def _train(
    model: MultiLoraModel | PreTrainedModel,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    jobs: Sequence[AdapterJob],
    config: TrainConfig,
) -> list[TrainResult]:
    adaptable = model.adaptable if isinstance(model, MultiLoraModel) else AdaptableModel(base)
    linked = model.registry.linked if isinstance(model, MultiLoraModel) else LinkedAttention(base)
    try:
        check_trainable_base(base)
        ranks = ProcessGroup(base.device, sharded=config.fsdp)
        if config.fsdp:
            check_sharded(base, jobs, config, ranks)
        attention = linked.layers if any(needs_attention(job) for job in jobs) else None
        sites = linked.sites if any(job.reft is not None for job in jobs) else None
        device = ranks.device if config.fsdp else base.device  # where the base model's weights, or its shards, are
        states = make_states(jobs, base, adaptable, tokenizer, attention, sites, device=device)
        if sites is not None:
            parameters = [state.parameters for state in states]
            sites.hook_sites(key for own in parameters if isinstance(own, TrainableReft) for key in own.sites)
        adaptable.attach([path for state in states for path in (*state.parameters.paths, *state.frozen.paths)])
        identity = run_fingerprint(states, base)
        if config.fsdp:
            shard_base(base, ranks)
        task = AdapterTask(base, states, config, ranks, attention)
        try:
            results = run_task(task, config, ranks, identity, after_divergence=_AFTER_DIVERGENCE)
        except TrainingError as error:  # the other jobs are done
            _complete_folders(base, tokenizer, states, error.results, config, ranks)
            raise
        _complete_folders(base, tokenizer, states, results, config, ranks)
        return results
    finally:
        if not isinstance(model, MultiLoraModel):
            adaptable.detach()
            linked.detach()


def _complete_folders(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    states: Sequence[JobState],
    results: Sequence[TrainResult],
    config: TrainConfig,
    ranks: ProcessGroup,
) -> None:
    """What comes beside the weights of finished LoRAs, and where the run pushes them."""
    if config.prompt_centroids and config.fsdp:
        logger.info("no prompt centroids are written: the base model is sharded. Later: loraplex auto fit")
    elif config.prompt_centroids and ranks.is_first:
        write_centroids(base, tokenizer, states, results)
    if ranks.is_first:
        for state, result in zip(states, results, strict=True):
            if state.job.lora is not None and result.finished != "diverged":
                write_card(state, result)
        _push(results, config)
    ranks.wait()


def _push(results: Sequence[TrainResult], config: TrainConfig) -> None:
    """Every finished adapter; what the hub refuses is told when the others are there. Raises RemoteError."""
    refused = []
    for result in (result for result in results if config.push_to_hub and result.finished != "diverged"):
        try:
            place = push_adapter(
                result.folder, repo_of(config.push_to_hub or "", result.name), private=config.push_private
            )
            logger.info("%r is at %s", result.name, place)
        except RemoteError as error:
            refused.append(str(error))
    if refused:
        raise RemoteError(" ".join(refused))


def _check_push(jobs: Sequence[AdapterJob], config: TrainConfig) -> None:
    """Raise ConfigError where an adapter couldn't be pushed, before it is trained."""
    if config.push_to_hub is None:
        return
    repos: dict[str, str] = {}
    for job in jobs:
        if job.lora is None:
            raise ConfigError(f"{job.label}: push_to_hub is set, but it trains no LoRA. Train it in a run of its own.")
        repo = repo_of(config.push_to_hub, job.name)
        check_can_push(repo)
        if repo in repos:
            raise ConfigError(f"{job.label} and job {repos[repo]!r} would both be pushed to {repo!r}. Rename one.")
        repos[repo] = job.name


def _inputs(jobs: Sequence[AdapterJob]) -> dict[str, list[Path]]:
    """By what they are, the files and folders that the jobs read."""
    inputs = {}
    for job in jobs:
        inputs[f"data of job {job.name!r}"] = [Path(job.data)]
        inputs[f"eval_data of job {job.name!r}"] = [] if job.eval_data is None else [Path(job.eval_data)]
        inputs[f"init_from of job {job.name!r}"] = (
            [Path(job.init_from)] if isinstance(job.init_from, str | Path) else []
        )
        members = [Path(member) for member, _ in job.after if isinstance(member, str | Path)]
        inputs[f"a member of after of job {job.name!r}"] = members
    return inputs
