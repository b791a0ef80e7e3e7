"""Settings that adapters and mixtures share: the optimizer, the steps, evaluation, and the run."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from loraplex.errors import ConfigError
from loraplex.output_files import writing
from loraplex.training.core.checks import (
    MAX_STEPS,
    check_flags,
    check_learning_rate,
    check_num_steps,
    check_number,
    check_whole,
)
from loraplex.training.core.trackers import check_trackers

Schedule = Literal["constant", "linear", "cosine"]
BestBy = Literal["loss", "exact_match"]
# Options that checkpoints from before there were the options don't have, with the values that change nothing.
NEWER_EVALUATION: Mapping[str, Any] = {"keep_best": False, "best_by": "loss"}
SCHEDULES: tuple[str, ...] = get_args(Schedule)
Config = TypeVar("Config")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, its learning rate over the steps, and clipping."""

    learning_rate: float = 1e-3
    schedule: Schedule = "cosine"  # after the warm-up; linear and cosine end at 0
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0  # None clips nothing

    def __post_init__(self) -> None:
        check_learning_rate("optimizer", self.learning_rate)
        check_whole(self, ("warmup_steps",), minimum=0)
        check_number("optimizer", "weight_decay", self.weight_decay, minimum=0)
        if self.max_grad_norm is not None:
            check_number("optimizer", "max_grad_norm", self.max_grad_norm, above=0)
        if self.schedule not in SCHEDULES:
            raise ConfigError(f"schedule is {self.schedule!r}; choose one of {list(SCHEDULES)}.")


@dataclass(frozen=True, kw_only=True)
class StepsConfig:
    """How many steps are taken, and the records of each.

    A step takes `batch_size * gradient_accumulation` records. Its loss is the mean over all answer tokens of
    these records, so accumulating gives the same gradients as the larger batch.
    """

    max_steps: int | None = None  # exactly one of max_steps and epochs
    epochs: int | None = None
    batch_size: int = 16  # records of one micro-batch
    gradient_accumulation: int = 1
    max_length: int = 512  # tokens; longer records lose tokens on the left

    def __post_init__(self) -> None:
        check_whole(self, ("batch_size", "gradient_accumulation"), minimum=1)
        check_whole(self, ("max_steps",), minimum=1, maximum=MAX_STEPS, optional=True)
        check_whole(self, ("epochs",), minimum=1, optional=True)
        check_whole(self, ("max_length",), minimum=2)
        if (self.max_steps is None) == (self.epochs is None):
            raise ConfigError(f"max_steps is {self.max_steps} and epochs is {self.epochs}; set exactly one of them.")

    @property
    def records_per_step(self) -> int:
        return self.batch_size * self.gradient_accumulation

    def count(self, label: str, steps_per_epoch: int, optimizer: OptimizerConfig) -> int:
        """The steps of the job `label`. Raises ConfigError for too many, or for a warm-up that never ends."""
        num_steps = self.max_steps or (self.epochs or 0) * steps_per_epoch
        check_num_steps(label, num_steps)
        if optimizer.warmup_steps >= num_steps:
            raise ConfigError(
                f"{label}: warmup_steps is {optimizer.warmup_steps}, but there are only {num_steps} steps. Lower "
                "warmup_steps."
            )
        return num_steps


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How often the held-out loss is computed, of which records, and when it ends training."""

    eval_every: int = 50  # steps
    eval_fraction: float = 0.1  # held out where no eval_data is given; 0 holds nothing out
    eval_records: int | None = 256  # at most so many (of each source) are evaluated; None is all
    patience: int | None = None  # evaluations without a better loss before training stops
    keep_best: bool = False  # write the weights of the best evaluation, as with patience, not the last
    best_by: BestBy = "loss"  # or "exact_match": of records whose every answer token is the most likely one

    def __post_init__(self) -> None:
        check_whole(self, ("eval_every",), minimum=1)
        check_whole(self, ("patience", "eval_records"), minimum=1, optional=True)
        check_flags(self, ("keep_best",))
        if self.best_by not in get_args(BestBy):
            raise ConfigError(f"best_by is {self.best_by!r}; choose one of {list(get_args(BestBy))}.")
        check_number("evaluation", "eval_fraction", self.eval_fraction, minimum=0, below=1)

    @property
    def keeps_best(self) -> bool:
        return self.keep_best or self.patience is not None

    def check_data(self, label: str, eval_data: object) -> None:
        """Raise ConfigError, which starts with `label`, where patience waits for losses that are never computed."""
        waits = f"patience is {self.patience}" if self.patience is not None else "keep_best is True"
        if self.keeps_best and eval_data is None and self.eval_fraction == 0:
            raise ConfigError(
                f"{label}: {waits}, but there is nothing to evaluate. Set eval_data, or an eval_fraction above 0."
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Where a run writes, and how it computes; none of it changes what is learnt beyond rounding."""

    output: str | Path
    checkpoint_every: int = 50  # steps
    resume: bool = True  # go on from the checkpoint in `output`, if there is one; False starts over
    progress: bool = True  # bars where standard error is a terminal, else lines of the log
    plots: bool = True
    tokens_per_forward: int = 1024  # padded tokens; larger micro-batches are computed in parts
    prompt_centroids: bool = True  # beside LoRAs that have prompts, for adapters="auto"
    share_prefixes: bool = True  # compute once what all records of an adapter's micro-batch start with
    fsdp: bool = False  # the base model's weights are shared out over the processes; of adapters alone
    packing: bool = False  # rows of a pass stand in one sequence without padding, each by itself; of adapters alone
    push_to_hub: str | None = None  # a user or organization: each LoRA becomes its repository of that name
    push_private: bool = False
    trackers: tuple[str, ...] = ()  # "tensorboard", "wandb", "mlflow": where the logs' numbers go besides
    # Layers keep only what they are given, and run again in the backward pass: less memory, a third more time. Of
    # adapters alone, and no prefixes are shared then.
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        check_whole(self, ("checkpoint_every", "tokens_per_forward"), minimum=1)
        check_flags(
            self,
            (
                "resume",
                "progress",
                "plots",
                "prompt_centroids",
                "share_prefixes",
                "gradient_checkpointing",
                "push_private",
                "packing",
                "fsdp",
            ),
        )
        check_trackers(self.trackers)
        output = Path(self.output)
        with writing(output):  # a name that is too long, for example
            is_file = output.exists() and not output.is_dir()
        if is_file:
            raise ConfigError(f"output {str(output)!r} is a file; give a folder, which need not exist yet.")


def parts_of(config: type[Any]) -> dict[str, type[Any]]:
    """By field, the configs that a config is composed of; their modules' annotations are classes, not strings."""
    return {field.name: field.type for field in fields(config) if is_dataclass(field.type)}  # type: ignore[misc]


def option_names(config: type[Any]) -> list[str]:
    """The fields of a config, with those of the configs that it is composed of in their place."""
    parts = parts_of(config)
    names = [option_names(parts[f.name]) if f.name in parts else [f.name] for f in fields(config)]
    return [name for of_field in names for name in of_field]


def compose(config: type[Config], options: Mapping[str, Any], label: str) -> Config:
    """A config of flat options, each given to the part that has a field of its name.

    Raises ConfigError, which starts with `label`, where a part can't be made, and TypeError for unknown options.
    """
    left, parts = dict(options), {}
    for name, part in parts_of(config).items():
        own = {option: left.pop(option) for option in option_names(part) if option in left}
        try:
            parts[name] = compose(part, own, label)
        except ConfigError as error:
            raise ConfigError(f"{label}: {error}") from None
    return config(**parts, **left)


def flat_options(config: object) -> dict[str, Any]:
    """By name, the options of a config and of those that it is composed of."""
    parts = parts_of(type(config))
    options: dict[str, Any] = {}
    for name in (field.name for field in fields(config)):  # type: ignore[arg-type]
        value = getattr(config, name)
        options |= flat_options(value) if name in parts else {name: value}
    return options
