"""How to train a mixture: the optimisation of its scaling head, and where and how a run computes."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from loraplex.errors import ConfigError
from loraplex.output_files import writing
from loraplex.training.config import SCHEDULES, Schedule
from loraplex.training.core.checks import MAX_STEPS, check_flags, check_learning_rate, check_number, check_whole
from loraplex.training.mixture.sources import Data, DataSource, as_sources
from loraplex.xlora.formats.mixture_folder import LAYOUTS, Layout

# What decides nothing but where a run writes and how it computes; data is compared by content.
_NOT_LEARNT = {
    *("output", "layout", "eval_data", "hidden_cache_bytes"),
    *("checkpoint_every", "resume", "progress", "plots", "tokens_per_forward"),
}


@dataclass(frozen=True, kw_only=True)
class MixtureTrainConfig:
    """One run of `train_mixture`.

    A step takes `batch_size * gradient_accumulation` records; its loss is the mean over all their answer tokens.
    """

    output: str | Path
    layout: Layout = "peft"  # of the folder that is written
    eval_data: Sequence[Data | DataSource] | None = None  # held out; None holds out `eval_fraction` of each source
    eval_fraction: float = 0.1  # 0 holds nothing out
    eval_records: int | None = 256  # of each source at most so many are evaluated; None is all
    eval_every: int = 50  # steps
    patience: int | None = None  # held-out evaluations without a better loss before training stops
    learning_rate: float = 1e-3
    schedule: Schedule = "cosine"  # after the warm-up; linear and cosine end at 0
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0
    max_steps: int | None = None  # exactly one of max_steps and epochs
    epochs: int | None = None
    batch_size: int = 16  # records of one micro-batch
    gradient_accumulation: int = 1
    seed: int = 0  # of the order of the data, the held-out split and dropout
    max_length: int = 512  # tokens; longer records lose tokens on the left
    load_balance_weight: float = 0.0  # of regularizers.load_balance in the loss
    sparsity_weight: float = 0.0  # of regularizers.mean_entropy in the loss
    expert_dropout: float = 0.0  # on what each expert reads, as PEFT's lora_dropout; the paper's experts have none
    hidden_cache_bytes: int = 2 << 30  # hidden states of the scaling pass kept in memory; the rest is computed again
    checkpoint_every: int = 50  # steps
    resume: bool = True  # go on from the checkpoint in `output`, if there is one; False starts over
    progress: bool = True  # bars, where standard error is a terminal
    plots: bool = True
    tokens_per_forward: int = 1024  # padded tokens; larger micro-batches are computed in parts

    def __post_init__(self) -> None:
        check_whole(self, ("batch_size", "gradient_accumulation", "eval_every"), minimum=1)
        check_whole(self, ("checkpoint_every", "tokens_per_forward"), minimum=1)
        check_whole(self, ("warmup_steps",), minimum=0)
        check_whole(self, ("seed", "hidden_cache_bytes"), minimum=0, maximum=2**63 - 1)
        check_whole(self, ("max_steps",), minimum=1, maximum=MAX_STEPS, optional=True)
        check_whole(self, ("epochs", "patience", "eval_records"), minimum=1, optional=True)
        check_whole(self, ("max_length",), minimum=2)
        check_flags(self, ("resume", "progress", "plots"))
        self._check_numbers()
        self._check_combinations()

    @property
    def records_per_step(self) -> int:
        return self.batch_size * self.gradient_accumulation

    @property
    def eval_sources(self) -> list[DataSource] | None:
        return None if self.eval_data is None else as_sources(self.eval_data, "eval_data")

    def identity(self) -> dict[str, Any]:
        """The options that decide what is learnt."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in _NOT_LEARNT}

    def _check_numbers(self) -> None:
        label = "mixture training"
        check_learning_rate(label, self.learning_rate)
        for option in ("weight_decay", "load_balance_weight", "sparsity_weight"):
            check_number(label, option, getattr(self, option), minimum=0)
        for option in ("eval_fraction", "expert_dropout"):
            check_number(label, option, getattr(self, option), minimum=0, below=1)
        if self.max_grad_norm is not None:
            check_number(label, "max_grad_norm", self.max_grad_norm, above=0)

    def _check_combinations(self) -> None:
        if self.layout not in LAYOUTS:
            raise ConfigError(f"layout is {self.layout!r}; choose one of {list(LAYOUTS)}.")
        if self.schedule not in SCHEDULES:
            raise ConfigError(f"schedule is {self.schedule!r}; choose one of {list(SCHEDULES)}.")
        if (self.max_steps is None) == (self.epochs is None):
            raise ConfigError(f"max_steps is {self.max_steps} and epochs is {self.epochs}; set exactly one of them.")
        if self.patience is not None and self.eval_data is None and self.eval_fraction == 0:
            raise ConfigError(
                f"patience is {self.patience}, but there is nothing to evaluate. Set eval_data, or an eval_fraction "
                "above 0."
            )
        output = Path(self.output)
        with writing(output):  # a name that is too long, for example
            is_file = output.exists() and not output.is_dir()
        if is_file:
            raise ConfigError(f"output {str(output)!r} is a file; give a folder, which need not exist yet.")
