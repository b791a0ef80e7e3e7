"""What to train: one AdapterJob for each adapter, and one TrainConfig for the run."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal, get_args

from loraplex.adapters.config import LoraConfig
from loraplex.adapters.names import check_name
from loraplex.adapters.weights import Adapter
from loraplex.errors import ConfigError, UnsupportedAdapterError
from loraplex.output_files import writing
from loraplex.residual.modules import LinkedResidual, ResidualConfig, SteeringVector
from loraplex.training.core.checks import MAX_STEPS, check_flags, check_learning_rate, check_number, check_whole
from loraplex.validation import is_finite

Schedule = Literal["constant", "linear", "cosine"]
LinkMember = str | Path | Adapter | LinkedResidual | SteeringVector  # a folder or hub id, or from memory
SCHEDULES: tuple[str, ...] = get_args(Schedule)


@dataclass(frozen=True, kw_only=True)
class AdapterJob:
    """One adapter to train: its data, the settings of its LoRA or linked residual, and its own optimisation.

    A step takes `batch_size * gradient_accumulation` records. Its loss is the mean over all answer tokens of
    these records, so accumulating gives the same gradients as the larger batch.
    """

    name: str
    data: str | Path  # JSONL of conversations, prompts with completions, or texts (records.py)
    eval_data: str | Path | None = None  # held-out records; None holds out `eval_fraction` of the data
    lora: LoraConfig | None = None  # exactly one of lora and residual
    residual: ResidualConfig | None = None  # train a linked residual instead
    learning_rate: float = 1e-3
    schedule: Schedule = "cosine"  # after the warm-up; linear and cosine end at 0
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_steps: int | None = None  # exactly one of max_steps and epochs
    epochs: int | None = None
    batch_size: int = 16  # records of one micro-batch
    gradient_accumulation: int = 1
    max_grad_norm: float | None = 1.0
    seed: int = 0  # of the first weights, the order of the data, the held-out split and the dropout
    max_length: int = 512  # tokens; longer records lose tokens on the left
    patience: int | None = None  # held-out evaluations without a better loss before the job stops
    eval_every: int = 50  # steps
    eval_fraction: float = 0.1  # 0 holds nothing out
    eval_records: int | None = 256  # at most so many held-out records are evaluated; None is all
    init_from: str | Path | Adapter | LinkedResidual | None = None  # start from this adapter instead of fresh weights
    after: Sequence[
        tuple[LinkMember, float]
    ] = ()  # adapters with weights that all rows go through; they stay as they are

    def __post_init__(self) -> None:
        check_name(self.name)
        if any(part in ("", ".", "..") for part in self.name.split("/")):
            raise ConfigError(
                f"job {self.name!r} would be written outside of the output folder or to an odd place. Use "
                "names without empty parts, '.' and '..', such as 'team/protein'."
            )
        check_whole(self, ("batch_size", "gradient_accumulation", "eval_every"), minimum=1)
        check_whole(self, ("warmup_steps",), minimum=0)
        check_whole(self, ("seed",), minimum=0, maximum=2**63 - 1)
        check_whole(self, ("max_steps",), minimum=1, maximum=MAX_STEPS, optional=True)
        check_whole(self, ("epochs", "patience", "eval_records"), minimum=1, optional=True)
        check_whole(self, ("max_length",), minimum=2)
        self._check_numbers()
        self._check_combinations()
        if self.lora is not None:
            _check_trainable(self.name, self.lora)

    @property
    def lora_dropout(self) -> float:
        return 0.0 if self.lora is None else self.lora.lora_dropout

    @property
    def invocation(self) -> tuple[int, ...] | None:
        """The tokens from which on an aLoRA is active."""
        return None if self.lora is None else self.lora.alora_invocation_tokens

    @property
    def rank(self) -> int:
        config = self.residual if self.lora is None else self.lora
        assert config is not None, "a job trains one of the two"
        return config.r

    @property
    def records_per_step(self) -> int:
        return self.batch_size * self.gradient_accumulation

    def _check_numbers(self) -> None:
        check_learning_rate(f"job {self.name!r}", self.learning_rate)
        check_number(f"job {self.name!r}", "weight_decay", self.weight_decay, minimum=0)
        check_number(f"job {self.name!r}", "eval_fraction", self.eval_fraction, minimum=0, below=1)
        if self.max_grad_norm is not None:
            check_number(f"job {self.name!r}", "max_grad_norm", self.max_grad_norm, above=0)

    def _check_combinations(self) -> None:
        if (self.lora is None) == (self.residual is None):
            raise ConfigError(
                f"job {self.name!r}: lora is {self.lora} and residual is {self.residual}; set exactly one of them."
            )
        for member, weight in self.after:
            if not isinstance(member, LinkMember) or not is_finite(weight):
                raise ConfigError(
                    f"job {self.name!r}: after has ({member!r}, {weight!r}); each entry is a folder, hub id, Adapter, "
                    "LinkedResidual or SteeringVector with a finite weight."
                )
        if self.schedule not in SCHEDULES:
            raise ConfigError(f"job {self.name!r}: schedule is {self.schedule!r}; choose one of {list(SCHEDULES)}.")
        if (self.max_steps is None) == (self.epochs is None):
            raise ConfigError(
                f"job {self.name!r}: max_steps is {self.max_steps} and epochs is {self.epochs}; set exactly "
                "one of them."
            )
        if self.patience is not None and self.eval_data is None and self.eval_fraction == 0:
            raise ConfigError(
                f"job {self.name!r}: patience is {self.patience}, but there is nothing to evaluate. Set "
                "eval_data, or an eval_fraction above 0."
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Where a run writes, and how it computes; none of it changes what is learnt beyond rounding."""

    output: str | Path
    checkpoint_every: int = 50  # steps
    resume: bool = True  # go on from the checkpoint in `output`, if there is one; False starts over
    progress: bool = True  # bars, where standard error is a terminal
    plots: bool = True
    tokens_per_forward: int = 1024  # padded tokens; larger micro-batches are computed in parts
    share_prefixes: bool = True  # compute what all records of a job start with once a micro-batch

    def __post_init__(self) -> None:
        check_whole(self, ("checkpoint_every", "tokens_per_forward"), minimum=1)
        check_flags(self, ("resume", "progress", "plots", "share_prefixes"))
        output = Path(self.output)
        with writing(output):  # a name that is too long, for example
            is_file = output.exists() and not output.is_dir()
        if is_file:
            raise ConfigError(f"output {str(output)!r} is a file; give a folder, which need not exist yet.")


def check_jobs(jobs: "list[AdapterJob]") -> None:
    """Raise ConfigError where jobs are missing or would write to the same place."""
    if not jobs:
        raise ConfigError("there are no jobs; give at least one AdapterJob.")
    names = [job.name for job in jobs]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two jobs are called {name!r}. Give each adapter its own name; names: {names}.")
        if f"{name}.diverged" in names:
            raise ConfigError(
                f"a job is called {name + '.diverged'!r}, where {name!r} would leave its last good weights."
            )
        inside = [parent.as_posix() for parent in PurePosixPath(name).parents if parent.as_posix() in names]
        if inside:
            raise ConfigError(f"job {name!r} would write into the folder of job {inside[0]!r}. Rename one of them.")


def _check_trainable(name: str, lora: LoraConfig) -> None:
    if lora.target_modules is None:
        raise ConfigError(
            f"job {name!r}: lora.target_modules is None; list the modules to adapt, such as ('q_proj', "
            "'v_proj'), or set 'all-linear'."
        )
    if lora.use_dora:
        raise UnsupportedAdapterError(
            f"job {name!r}: use_dora is True, and DoRA can't be trained here: its gradient needs the norm of "
            "the full merged weight of every module at every step, which shares nothing between the rows' "
            "adapters. Set use_dora=False, or train it with PEFT; trained DoRA adapters can be loaded."
        )
    if lora.lora_dropout == 1:
        raise ConfigError(f"job {name!r}: lora_dropout is 1, which drops everything; use a value below 1.")
