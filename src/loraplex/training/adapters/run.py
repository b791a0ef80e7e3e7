"""train_adapters: many LoRA adapters at once on one frozen base model, in one batch."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loraplex.adapters.atomic_dir import check_destination
from loraplex.adapters.peft.config import CONFIG_FILE
from loraplex.adapters.peft.reader import WEIGHTS_FILE
from loraplex.adapters.peft.record import RECORD_FILE
from loraplex.errors import AdapterExistsError, TrainingError
from loraplex.layers.attach import AdaptableModel
from loraplex.models.base_checks import refuse_injected_adapters
from loraplex.models.multi_lora import MultiLoraModel
from loraplex.output_files import writing
from loraplex.residual.format import CONFIG_FILE as RESIDUAL_CONFIG_FILE
from loraplex.residual.format import WEIGHTS_FILE as RESIDUAL_WEIGHTS_FILE
from loraplex.residual.layers import AttentionLayers
from loraplex.residual.registry import LinkedAttention
from loraplex.residual.rows import ChainLink
from loraplex.training.adapters.job_state import DIVERGED, JobState
from loraplex.training.adapters.links import needs_attention
from loraplex.training.adapters.residual_parameters import ResidualParameters
from loraplex.training.adapters.residual_rows import ResidualRows
from loraplex.training.adapters.setup import make_states
from loraplex.training.adapters.trainer import Trainer
from loraplex.training.config import AdapterJob, TrainConfig, check_jobs
from loraplex.training.core.checkpoint import FILE, load_checkpoint
from loraplex.training.core.distributed import ProcessGroup
from loraplex.training.core.logs import JobLog
from loraplex.training.core.outputs import check_outputs
from loraplex.training.core.plots import plot_losses
from loraplex.training.core.progress import training_progress
from loraplex.training.core.run_fingerprint import run_fingerprint
from loraplex.training.core.train_state import Divergence, Finish
from loraplex.training.forward.attention import fast_attention
from loraplex.training.forward.loss import LossComputer
from loraplex.training.forward.probe import can_share_prefixes, check_trainable_base

logger = logging.getLogger(__name__)

REPLACEABLE = {CONFIG_FILE, WEIGHTS_FILE, RESIDUAL_CONFIG_FILE, RESIDUAL_WEIGHTS_FILE, RECORD_FILE, "README.md"}


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What became of one job."""

    name: str
    folder: Path  # the adapter in its format; of a job that diverged, its last good weights: NAME.diverged
    log: Path  # JSON lines
    num_steps: int
    finished: Finish  # "steps": all of them; "patience": the held-out loss stopped falling; "diverged"
    train_losses: tuple[float, ...]  # one for each step
    eval_steps: tuple[int, ...]
    eval_losses: tuple[float, ...]
    best_step: int | None  # of the lowest held-out loss; with patience, the step whose weights were written
    num_tokens: int  # of all records trained on, without padding
    num_truncated: int  # records that lost tokens on the left
    seconds: float  # of steps, evaluations excluded; shared with the other jobs
    divergence: Divergence | None = None  # in which step, and what was no longer finite
    zero_gradient_since: int | None = None  # from this step to the last the gradient was exactly 0


def train_adapters(
    model: MultiLoraModel | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    jobs: Sequence[AdapterJob],
    config: TrainConfig,
) -> list[TrainResult]:
    """Train one adapter, LoRA or linked residual, for each job; the rows of all jobs share the forward passes.

    Each job trains as if alone: gradients reach only a row's own adapter. Job `name` leaves
    `<output>/<name>/` (the adapter in its format), `<output>/<name>.jsonl` (its log) and
    `<output>/<name>.png` (its losses); the run leaves `<output>/checkpoint.safetensors`, from which it goes
    on after a kill exactly where it would have been.

    Everything is checked before the first step. Raises ConfigError, DatasetError, UnsupportedAdapterError,
    BaseModelError, CheckpointError (the checkpoint is of another run), AdapterExistsError (an adapter is in
    the output folder but no checkpoint) and OutputError (no room, or somebody else's file is in the way). A job whose
    loss, gradients or weights are no longer finite is stopped, and its last good weights are written to
    `<output>/<name>.diverged/`; when the others are done, TrainingError names it, and its `results` are what would have
    been returned.
    """
    jobs = list(jobs)
    check_jobs(jobs)
    check_outputs(Path(config.output), [job.name for job in jobs], _inputs(jobs))
    if not isinstance(model, MultiLoraModel):
        refuse_injected_adapters(model)
    base = model.base if isinstance(model, MultiLoraModel) else model.eval().requires_grad_(False)
    adaptable = model.adaptable if isinstance(model, MultiLoraModel) else AdaptableModel(base)
    check_trainable_base(base)
    ranks = ProcessGroup(base.device)
    linked = model.registry.linked if isinstance(model, MultiLoraModel) else LinkedAttention(base)
    try:
        attention = linked.layers if any(needs_attention(job) for job in jobs) else None
        states = make_states(jobs, base, adaptable, tokenizer, attention)
        adaptable.attach([path for state in states for path in (*state.parameters.paths, *state.frozen.paths)])
        _train(base, states, config, ranks, attention)
    finally:
        if not isinstance(model, MultiLoraModel):
            adaptable.detach()
            linked.detach()
    results = [_result(state, Path(config.output)) for state in states]
    if any(state.has_diverged for state in states):
        raise TrainingError(_divergences(states, Path(config.output)), results)
    return results


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


def _divergences(states: Sequence[JobState], output: Path) -> str:
    """What diverged, where its last good weights are, and how to go on."""
    told = [
        f"{state.divergence_message()}. Its last good weights, of step {state.progress.divergence.last_good_step}, are "
        f"in {str(output / state.folder_name)!r}."
        for state in states
        if state.progress.divergence is not None
    ]
    if len(told) < len(states):
        told.append("The other jobs are done and written.")
    told.append(
        "In a run with the same output folder, a job that diverged begins anew with its new settings, or may be left "
        "out; the others are kept."
    )
    return " ".join(told)


def _train(
    base: PreTrainedModel,
    states: Sequence[JobState],
    config: TrainConfig,
    ranks: ProcessGroup,
    attention: AttentionLayers | None,
) -> None:
    output = Path(config.output)
    identity = run_fingerprint(states, base)
    logs = [JobLog(output / f"{state.job.name}.jsonl", enabled=ranks.is_first) for state in states]
    log_bytes = _resume_or_start(output, states, identity, config, ranks)
    for log, num_bytes in zip(logs, log_bytes, strict=True):
        log.start(num_bytes)
    losses = LossComputer(
        base,
        len(states),
        tokens_per_forward=config.tokens_per_forward,
        share_prefixes=config.share_prefixes and can_share_prefixes(base),
        residuals=residual_rows(states, attention),
    )
    trainer = Trainer(states, losses, logs, config, identity, ranks)
    for index, state in enumerate(states):
        if state.is_finished:  # before the run was interrupted
            trainer.write(index)
    longest = max(len(e.ids) for state in states for e in (*state.data.train, *state.data.held_out))
    show = config.progress and ranks.is_first
    with fast_attention(base, longest), training_progress(states, enabled=show) as on_step:
        trainer.run(on_step)
    if config.plots and ranks.is_first:
        for state in (state for state in states if state.progress.train_losses):
            title = f"{state.name}: rank {state.job.rank}, learning rate {state.job.learning_rate:g}"
            plot_losses(state, title, output / f"{state.name}.png")
    ranks.wait()


def residual_rows(states: Sequence[JobState], attention: AttentionLayers | None) -> ResidualRows:
    """The residuals that each job's rows go through: those before the one in training, and it."""
    chains = {}
    for index, state in enumerate(states):
        chain = state.frozen.chain
        if isinstance(state.parameters, ResidualParameters):
            chain = (*chain, ChainLink(name=state.job.name, residual=state.parameters.residual()))
        if chain:
            chains[index] = chain
    return ResidualRows(chains, {} if attention is None else attention.num_heads)


def _resume_or_start(
    output: Path, states: Sequence[JobState], identity: dict[str, object], config: TrainConfig, ranks: ProcessGroup
) -> list[int]:
    """Restore the states from a checkpoint, or prepare an empty output folder; the bytes of each log to keep."""
    found = (output / FILE).exists()
    if found and config.resume:
        log_bytes = load_checkpoint(output, states, identity)
        _check_folders_of_diverged(output, states)
        logger.info("going on from %s at step %d", output / FILE, max(s.progress.step for s in states))
        ranks.wait()
        return log_bytes
    existing = [state.job.name for state in states if (output / state.job.name).exists()]
    if existing and config.resume:
        raise AdapterExistsError(
            f"{str(output / existing[0])!r} exists already, and there is no checkpoint to go on from. Choose "
            "another output folder, or pass resume=False to train it anew and replace it."
        )
    for name in existing:
        check_destination(output / name, "an adapter", REPLACEABLE, overwrite=True)
    _check_folders_of_diverged(output, states)
    ranks.wait()
    if ranks.is_first:
        with writing(output):
            output.mkdir(parents=True, exist_ok=True)
            (output / FILE).unlink(missing_ok=True)
    ranks.wait()
    return [0] * len(states)


def _check_folders_of_diverged(output: Path, states: Sequence[JobState]) -> None:
    for folder in (output / f"{state.job.name}{DIVERGED}" for state in states):
        if folder.exists():
            check_destination(folder, "an adapter", REPLACEABLE, overwrite=True)


def _result(state: JobState, output: Path) -> TrainResult:
    progress = state.progress
    assert progress.finished is not None, f"job {state.job.name!r} is returned before it is finished"
    return TrainResult(
        name=state.job.name,
        folder=output / state.folder_name,
        log=output / f"{state.job.name}.jsonl",
        num_steps=progress.step,
        finished=progress.finished,
        train_losses=tuple(progress.train_losses),
        eval_steps=tuple(progress.eval_steps),
        eval_losses=tuple(progress.eval_losses),
        best_step=progress.best_step,
        num_tokens=progress.num_tokens,
        num_truncated=state.data.num_truncated,
        seconds=progress.seconds,
        divergence=progress.divergence,
        zero_gradient_since=progress.zero_gradient_since,
    )
