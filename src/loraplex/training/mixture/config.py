"""How to train a mixture: the optimisation of its scaling head or router, and where and how a run computes."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from loraplex.errors import ConfigError
from loraplex.training.core.checks import check_number, check_whole
from loraplex.training.core.config import (
    NEWER_EVALUATION,
    EvaluationConfig,
    OptimizerConfig,
    StepsConfig,
    TrainConfig,
    flat_options,
)
from loraplex.training.mixture.sources import Data, DataSource, as_sources
from loraplex.training.routers.config import RouterTrainConfig
from loraplex.xlora.formats.mixture_folder import LAYOUTS, Layout

# What decides nothing but where a run writes and how it computes; data is compared by content.
_NOT_LEARNT = {"layout", "eval_data", "hidden_cache_bytes"}
_LABEL = "mixture training"


@dataclass(frozen=True, kw_only=True)
class MixtureTrainConfig:
    """One run of `train_mixture`."""

    run: TrainConfig
    layout: Layout = "peft"  # of the folder that is written
    eval_data: Sequence[Data | DataSource] | None = None  # held out; None holds out a fraction of each source
    steps: StepsConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    seed: int = 0  # of the order of the data, the held-out split and dropout
    router: RouterTrainConfig = field(default_factory=RouterTrainConfig)  # of mixtures with a linear router only
    load_balance_weight: float = 0.0  # of regularizers.load_balance, a router's of switch_load_balance
    sparsity_weight: float = 0.0  # of the scalings' or gates' mean entropy
    expert_dropout: float = 0.0  # on what each expert reads, as PEFT's lora_dropout; the paper's experts have none
    # Hidden states of the scaling pass, a teacher's too, that are kept in memory; the rest is computed again.
    hidden_cache_bytes: int = 2 << 30

    def __post_init__(self) -> None:
        check_whole(self, ("seed", "hidden_cache_bytes"), minimum=0, maximum=2**63 - 1)
        for option in ("load_balance_weight", "sparsity_weight"):
            check_number(_LABEL, option, getattr(self, option), minimum=0)
        check_number(_LABEL, "expert_dropout", self.expert_dropout, minimum=0, below=1)
        for option in ("packing", "fsdp"):
            if getattr(self.run, option):
                raise ConfigError(f"{_LABEL}: {option} is for adapters alone. Set {option}=False.")
        if self.run.gradient_checkpointing:
            raise ConfigError(f"{_LABEL}: gradient_checkpointing is for adapters alone. Lower tokens_per_forward.")
        if self.layout not in LAYOUTS:
            raise ConfigError(f"layout is {self.layout!r}; choose one of {list(LAYOUTS)}.")
        self.evaluation.check_data(_LABEL, self.eval_data)
        if self.evaluation.best_by != "loss":
            raise ConfigError(f"{_LABEL}: best_by is {self.evaluation.best_by!r}, which is for adapters alone.")

    @property
    def eval_sources(self) -> list[DataSource] | None:
        return None if self.eval_data is None else as_sources(self.eval_data, "eval_data")

    def identity(self) -> dict[str, Any]:
        """The options that decide what is learnt, without those of routers."""
        left_out = _NOT_LEARNT | flat_options(self.run).keys() | flat_options(self.router).keys()
        options = {name: value for name, value in flat_options(self).items() if name not in left_out}
        unset = {name for name, default in NEWER_EVALUATION.items() if options[name] == default}
        return {name: value for name, value in options.items() if name not in unset}
