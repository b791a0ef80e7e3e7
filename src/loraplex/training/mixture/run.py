"""train_mixture: the scaling head of a mixture, on a mix of its experts' data."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState

from loraplex.errors import (
    AdapterExistsError,
    ConfigError,
    LoraplexError,
    MixtureError,
    TrainingError,
    UnsupportedAdapterError,
)
from loraplex.models.end_tokens import training_ends
from loraplex.models.multi_lora import MultiLoraModel
from loraplex.output_files import writing
from loraplex.training.adapters.job_state import DIVERGED
from loraplex.training.core.checkpoint import FILE, load_checkpoint
from loraplex.training.core.logs import JobLog
from loraplex.training.core.outputs import check_outputs
from loraplex.training.core.plots import plot_losses
from loraplex.training.core.progress import counting_progress, training_progress
from loraplex.training.core.train_state import Divergence, Finish
from loraplex.training.forward.attention import fast_attention
from loraplex.training.forward.probe import check_trainable_base
from loraplex.training.mixture.config import MixtureTrainConfig
from loraplex.training.mixture.data import load_mixture_data
from loraplex.training.mixture.hidden_states import HiddenStates
from loraplex.training.mixture.losses import MixtureLosses
from loraplex.training.mixture.run_fingerprint import mixture_fingerprint
from loraplex.training.mixture.sources import Data, DataSource, as_sources
from loraplex.training.mixture.state import MixtureState, write_last_good
from loraplex.training.mixture.trainer import MixtureTrainer
from loraplex.xlora.formats.folders import read_mixture_folder
from loraplex.xlora.formats.peft_layout import check_peft_can_hold
from loraplex.xlora.mixture import Mixture

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class MixtureTrainResult:
    """What became of a mixture's training."""

    name: str
    folder: Path  # the mixture, in the layout that the config asks for
    log: Path  # JSON lines
    num_steps: int
    finished: Finish  # "steps": all of them; "patience": the held-out loss stopped falling; "diverged"
    train_losses: tuple[float, ...]  # one for each step, without load balance and sparsity
    eval_steps: tuple[int, ...]
    eval_losses: tuple[float, ...]
    best_step: int | None  # of the lowest held-out loss; with patience, the step whose weights were written
    num_tokens: int  # of all records trained on, without padding
    seconds: float  # of steps, without evaluations and the first scaling pass
    divergence: Divergence | None = None  # in which step, and what was no longer finite
    zero_gradient_since: int | None = None  # from this step to the last the gradient was exactly 0


def train_mixture(
    model: MultiLoraModel, mixture: str, data: Sequence[Data | DataSource], config: MixtureTrainConfig
) -> MixtureTrainResult:
    """Train the scaling head of a mixture of `model` (X-LoRA, arXiv 2402.07148); base model and experts are frozen.

    The loss is the cross-entropy of the answers' tokens. Several sources are mixed: every epoch takes all records, or
    their shares. With XLoraConfig.use_trainable_adapters the experts train too, and the model's are replaced. The run
    leaves `<output>/<mixture>/` (the mixture with its experts), `<output>/<mixture>.jsonl` (its log),
    `<output>/<mixture>.png` (its losses) and `<output>/checkpoint.safetensors`, from which it goes on after a kill
    exactly where it would have been. The mixture in memory gets the new weights at the end.

    Everything is checked before the first step. Raises AdapterNotFoundError (no such mixture), ConfigError,
    DatasetError, BaseModelError, MixtureError, UnsupportedAdapterError, CheckpointError (the checkpoint is of another
    run), AdapterExistsError (a mixture is in the output folder but no checkpoint) and OutputError (somebody else's file
    is in the way). TrainingError: loss, gradients or
    weights were no longer finite; the mixture in memory is as it was, and `<output>/<mixture>.diverged/` has the last
    good weights.
    """
    trained = model.mixtures.get(mixture)
    sources = as_sources(data)
    check_outputs(Path(config.output), [mixture], _inputs(sources, config))
    _check_mixture(model, trained, config)
    check_trainable_base(model.base)
    _check_length(model, config)
    vocab_size = next(model.base.get_input_embeddings().parameters()).shape[0]
    ends = training_ends(model.base, model.tokenizer)
    of_run = load_mixture_data(f"mixture {mixture!r}", sources, config, model.tokenizer, vocab_size, ends)
    state = MixtureState(model, trained, of_run, config)
    folder, log = Path(config.output) / mixture, JobLog(Path(config.output) / f"{mixture}.jsonl", enabled=True)
    identity = mixture_fingerprint(state, model.base)
    log.start(_resume_or_start(state, folder, identity))
    if not state.is_finished:
        _train(model, state, log, identity)
    if state.has_diverged:
        folder = folder.with_name(f"{folder.name}{DIVERGED}")
        write_last_good(model, state, folder)
        raise TrainingError(
            f"{state.divergence_message()}. Its last good weights are in {str(folder)!r}. Start over with "
            "resume=False (--no-resume), or with another output folder.",
            [_result(state, folder, log)],
        )
    _give_back(model, state)
    model.save_mixture(mixture, folder, layout=config.layout, overwrite=True)
    if config.plots:
        title = f"{mixture}: {len(trained.experts)} experts, learning rate {config.learning_rate:g}"
        plot_losses(state, title, folder.with_name(f"{folder.name}.png"))
    return _result(state, folder, log)


def _inputs(sources: Sequence[DataSource], config: MixtureTrainConfig) -> dict[str, list[Path]]:
    """By what they are, the files that the run reads; experts are read before their mixture's folder is replaced."""
    return {
        f"data source {source.name!r}": [Path(source.data)]
        for source in (*sources, *(config.eval_sources or ()))
        if isinstance(source.data, str | Path)
    }


def _train(model: MultiLoraModel, state: MixtureState, log: JobLog, identity: dict[str, Any]) -> None:
    config = state.config
    hidden_states = HiddenStates(
        model.base,
        state.mixture,
        state.experts,
        budget_bytes=config.hidden_cache_bytes,
        tokens_per_forward=config.tokens_per_forward,
    )
    needed = [] if state.is_finished else state.data.needed()  # finished: an earlier run could not write the mixture
    longest = max((len(example.ids) for example in needed), default=0)
    with fast_attention(model.base, longest):
        with counting_progress("scaling pass", enabled=config.progress) as on_progress:
            hidden_states.fill(needed, on_progress)
        kept, megabytes = hidden_states.num_kept, hidden_states.num_bytes / 1e6
        logger.info("the scaling pass of %d texts is kept in %.1f MB", kept, megabytes)
        if kept < (distinct := len({example.inputs for example in needed})):
            logger.warning(
                "%d texts don't fit hidden_cache_bytes=%d and are computed in every step",
                *(distinct - kept, config.hidden_cache_bytes),
            )
        trainer = MixtureTrainer(state, MixtureLosses(model.base, state, hidden_states), log, identity)
        with training_progress([state], enabled=config.progress) as on_step:
            trainer.run(on_step)


def _check_mixture(model: MultiLoraModel, mixture: Mixture, config: MixtureTrainConfig) -> None:
    """Raise where the mixture can't be trained as the config asks, or not saved."""
    if PartialState().num_processes > 1:
        raise ConfigError(
            f"a mixture is trained by one process, but there are {PartialState().num_processes}. Start it without "
            "accelerate launch."
        )
    regularized = config.load_balance_weight > 0 or config.sparsity_weight > 0
    if regularized and not mixture.config.enable_softmax:
        raise ConfigError(
            "load_balance_weight and sparsity_weight are defined on scalings that sum to 1, but the mixture has "
            "enable_softmax=False. Set the weights to 0."
        )
    if config.layout == "peft":
        check_peft_can_hold(mixture.config)
    if mixture.config.use_trainable_adapters:
        _check_trainable_experts(model, mixture)


def _check_trainable_experts(model: MultiLoraModel, mixture: Mixture) -> None:
    for expert in mixture.experts:
        others = [name for name in model.mixtures.using(expert) if name != mixture.name]
        if others:
            raise MixtureError(
                f"use_trainable_adapters would change the expert {expert!r}, which the mixture {others[0]!r} uses too. "
                "Unload that one, or load the expert again under another name for this mixture."
            )
        with model.store.lease([expert]) as leased:
            slot = leased[expert].slot
            assert slot is not None, f"{expert!r} is leased but in no slot"
            if any(weights.dora_scale is not None for weights in model.store.slots.held(slot).layers.values()):
                raise UnsupportedAdapterError(
                    f"the expert {expert!r} is a DoRA adapter, which can't be trained here. Set "
                    "use_trainable_adapters=False: frozen DoRA experts are supported."
                )


def _check_length(model: MultiLoraModel, config: MixtureTrainConfig) -> None:
    longest = getattr(model.base.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if longest is not None and config.max_length > longest:
        raise ConfigError(f"max_length is {config.max_length}, but the base model has {longest} positions. Lower it.")


def _resume_or_start(state: MixtureState, folder: Path, identity: dict[str, Any]) -> int:
    """Restore the state from a checkpoint, or prepare an empty output folder; the bytes of the log to keep."""
    output = Path(state.config.output)
    if (output / FILE).exists() and state.config.resume:
        (num_bytes,) = load_checkpoint(output, [state], identity)
        logger.info("going on from %s at step %d", output / FILE, state.progress.step)
        return num_bytes
    if folder.exists():
        if state.config.resume:
            raise AdapterExistsError(
                f"{str(folder)!r} exists already, and there is no checkpoint to go on from. Choose another output "
                "folder, or pass resume=False to train the mixture anew and replace it."
            )
        _check_replaceable(folder)
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
        (output / FILE).unlink(missing_ok=True)
    return 0


def _check_replaceable(folder: Path) -> None:
    """Raise now what writing the trained mixture would raise hours later."""
    try:
        read_mixture_folder(folder)
    except LoraplexError as error:
        raise AdapterExistsError(
            f"{str(folder)!r} is not a whole mixture ({error}), so it is not replaced. Choose another output folder, "
            "or remove this one."
        ) from error


def _give_back(model: MultiLoraModel, state: MixtureState) -> None:
    """Let the mixture in memory have the trained weights."""
    for name, adapter in state.trained_experts().items():
        model.load_adapter(name, adapter, replace=True)
    state.mixture.head.load_state_dict(state.head.state_dict())


def _result(state: MixtureState, folder: Path, log: JobLog) -> MixtureTrainResult:
    progress = state.progress
    assert progress.finished is not None, "a result is asked for before training is finished"
    return MixtureTrainResult(
        name=state.name,
        folder=folder,
        log=log.path,
        num_steps=progress.step,
        finished=progress.finished,
        train_losses=tuple(progress.train_losses),
        eval_steps=tuple(progress.eval_steps),
        eval_losses=tuple(progress.eval_losses),
        best_step=progress.best_step,
        num_tokens=progress.num_tokens,
        seconds=progress.seconds,
        divergence=progress.divergence,
        zero_gradient_since=progress.zero_gradient_since,
    )
