"""train_mixture: the scaling head or the linear router of a mixture, on a mix of its experts' data."""

from collections.abc import Sequence
from pathlib import Path

from loraplex.errors import ConfigError, MixtureError, UnsupportedAdapterError
from loraplex.layers.quantized.training import quantized_modules_train
from loraplex.models.mixtures import AnyMixture
from loraplex.models.multi_lora import MultiLoraModel
from loraplex.models.text.end_tokens import training_ends
from loraplex.training.core.distributed import ProcessGroup
from loraplex.training.core.outputs import check_outputs
from loraplex.training.core.results import TrainResult
from loraplex.training.core.run import run_task
from loraplex.training.core.trainer import TrainingTask
from loraplex.training.forward.probe import check_length, check_trainable_base
from loraplex.training.mixture.config import MixtureTrainConfig
from loraplex.training.mixture.data import load_mixture_data
from loraplex.training.mixture.sources import Data, DataSource, as_sources
from loraplex.training.mixture.state import MixtureState
from loraplex.training.mixture.task import MixtureTask
from loraplex.training.routers.checks import check_router
from loraplex.training.routers.config import RouterTrainConfig
from loraplex.training.routers.state import RouterState
from loraplex.training.routers.task import RouterTask
from loraplex.training.routers.teacher import Teacher
from loraplex.xlora.formats.peft_layout import check_peft_can_hold
from loraplex.xlora.mixture import Mixture

_AFTER_DIVERGENCE = "Start over with resume=False (--no-resume), or with another output folder."


def train_mixture(
    model: MultiLoraModel, mixture: str, data: Sequence[Data | DataSource], config: MixtureTrainConfig
) -> TrainResult:
    """Train the scaling head of a mixture of `model` (X-LoRA, arXiv 2402.07148), or its linear router.

    Base model and experts are frozen, and the loss is the cross-entropy of the answers' tokens, unless the options say
    otherwise: a router may learn from an X-LoRA (config.router.teacher), or together with its experts. Several sources
    are mixed: every epoch takes all records, or their shares. With XLoraConfig.use_trainable_adapters the experts train
    too, and the model's are replaced. The run leaves `<output>/<mixture>/` (the mixture with its experts),
    `<output>/<mixture>.jsonl` (its log), `<output>/<mixture>.png` (its losses) and `<output>/checkpoint.safetensors`,
    from which it goes on after a kill exactly where it would have been. The mixture in memory gets the new weights at
    the end.

    Everything is checked before the first step. Raises AdapterNotFoundError (no such mixture), ConfigError,
    DatasetError, BaseModelError, MixtureError, UnsupportedAdapterError, CheckpointError (the checkpoint is of another
    run), AdapterExistsError (a mixture is in the output folder but no checkpoint) and OutputError (somebody else's file
    is in the way). TrainingError: loss, gradients or
    weights were no longer finite; the mixture in memory is as it was, and `<output>/<mixture>.diverged/` has the last
    good weights.
    """
    with quantized_modules_train(model.base):
        return _train(model, mixture, data, config)


def _train(
    model: MultiLoraModel, mixture: str, data: Sequence[Data | DataSource], config: MixtureTrainConfig
) -> TrainResult:
    trained = model.mixtures.get(mixture)
    sources, label = as_sources(data), f"mixture {mixture!r}"
    check_outputs(Path(config.run.output), [mixture], _inputs(sources, config))
    ranks = ProcessGroup(model.base.device)
    if ranks.num_processes > 1:
        raise ConfigError(
            f"a mixture is trained by one process, but there are {ranks.num_processes}. Start it without "
            "accelerate launch."
        )
    teacher = _check(model, trained, config)
    check_trainable_base(model.base)
    check_length(label, config.steps.max_length, model.base)
    vocab_size = next(model.base.get_input_embeddings().parameters()).shape[0]
    ends = training_ends(model.base, model.tokenizer)
    of_run = load_mixture_data(label, sources, config, model.tokenizer, vocab_size, ends)
    task: TrainingTask
    if isinstance(trained, Mixture):
        state = MixtureState(model, trained, of_run, config)
        task, identity = MixtureTask(model.base, state), state.fingerprint()
    else:
        router_state = RouterState(model, trained, of_run, config, teacher)
        task, identity = RouterTask(model.base, router_state), router_state.fingerprint()
    (result,) = run_task(task, config.run, ranks, identity, after_divergence=_AFTER_DIVERGENCE)
    return result


def _check(model: MultiLoraModel, mixture: AnyMixture, config: MixtureTrainConfig) -> Teacher | None:
    """Raise where the mixture can't be trained as the config asks, or not saved; return a router's teacher."""
    if isinstance(mixture, Mixture):
        _check_xlora(model, mixture, config)
        return None
    check_router(mixture, config)
    if config.router.train_experts:
        _check_trainable_experts(model, mixture, "train_experts")
    if config.router.teacher is None:
        return None
    return Teacher(
        model,
        model.mixtures.xlora(config.router.teacher),
        mixture,
        budget_bytes=config.hidden_cache_bytes,
        max_tokens=config.run.tokens_per_forward,
    )


def _inputs(sources: Sequence[DataSource], config: MixtureTrainConfig) -> dict[str, list[Path]]:
    """By what they are, the files that the run reads; experts are read before their mixture's folder is replaced."""
    return {
        f"data source {source.name!r}": [Path(source.data)]
        for source in (*sources, *(config.eval_sources or ()))
        if isinstance(source.data, str | Path)
    }


def _check_xlora(model: MultiLoraModel, mixture: Mixture, config: MixtureTrainConfig) -> None:
    """Raise where the head can't be trained as the config asks, or not saved."""
    if config.router != RouterTrainConfig():
        raise ConfigError(
            f"{config.router} is for mixtures with a linear router, but {mixture.name!r} is an X-LoRA. Leave it out."
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
        _check_trainable_experts(model, mixture, "use_trainable_adapters")


def _check_trainable_experts(model: MultiLoraModel, mixture: AnyMixture, option: str) -> None:
    for expert in mixture.experts:
        others = [name for name in model.mixtures.using(expert) if name != mixture.name]
        if others:
            raise MixtureError(
                f"{option} would change the expert {expert!r}, which the mixture {others[0]!r} uses too. "
                "Unload that one, or load the expert again under another name for this mixture."
            )
        with model.store.lease([expert]) as leased:
            slot = leased[expert].slot
            assert slot is not None, f"{expert!r} is leased but in no slot"
            if any(weights.dora_scale is not None for weights in model.store.slots.held(slot).layers.values()):
                raise UnsupportedAdapterError(
                    f"the expert {expert!r} is a DoRA adapter, which can't be trained here. Set "
                    f"{option}=False: frozen DoRA experts are supported."
                )
