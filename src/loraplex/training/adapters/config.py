"""What to train: one AdapterJob for each adapter."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal, get_args

from loraplex.adapters.config import LoraConfig
from loraplex.adapters.names import check_name
from loraplex.adapters.weights import Adapter
from loraplex.errors import ConfigError, UnsupportedAdapterError
from loraplex.residual.modules import LinkedResidual, ResidualConfig, SteeringVector
from loraplex.residual.reft import ReftConfig, ReftResidual
from loraplex.training.adapters.objectives import LossName
from loraplex.training.adapters.starts import Start
from loraplex.training.core.checks import check_number, check_whole
from loraplex.training.core.config import EvaluationConfig, OptimizerConfig, StepsConfig
from loraplex.validation import is_finite, quoted

LinkMember = str | Path | Adapter | LinkedResidual | SteeringVector  # a folder or hub id, or from memory


@dataclass(frozen=True, kw_only=True)
class AdapterJob:
    """One adapter to train: its data, the settings of its LoRA, linked residual or LoReFT, and its own optimisation."""

    name: str
    data: str | Path  # JSONL of conversations, prompts with completions, or texts (records.py)
    eval_data: str | Path | None = None  # held-out records; None holds out a fraction of the data
    lora: LoraConfig | None = None  # exactly one of lora, residual and reft
    residual: ResidualConfig | None = None  # train a linked residual instead
    reft: ReftConfig | None = None  # or LoReFT interventions
    steps: StepsConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    loss: LossName = "cross_entropy"  # or "reward": each record's times its "reward"; "dpo": of chosen and rejected
    dpo_beta: float = 0.1  # how strongly DPO keeps to its reference: `init_from`, else the base model
    turns: Literal["all", "last"] = "all"  # which assistant turns of a conversation count for the loss
    seed: int = 0  # of the first weights, the order of the data, the held-out split and the dropout
    # Of the tokens before the first user turn's content, where an expert of a mixture can't know what will be asked: a
    # number from 0 to 1, or "dropout": 0 or 1, at random for each record, and 1 in evaluations.
    gates_before_user: float | Literal["dropout"] = 1.0
    # Start from this adapter instead of fresh weights.
    init_from: str | Path | Adapter | LinkedResidual | ReftResidual | None = None
    start: Start = "lora"  # or of the base model's own: "pissa", "olora"; written as plain LoRAs
    lora_plus_ratio: float = 1.0  # LoRA+ (arXiv 2402.12354): the learning rate of B, and of DoRA's m, over that of A
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
        check_whole(self, ("seed",), minimum=0, maximum=2**63 - 1)
        self.evaluation.check_data(self.label, self.eval_data)
        if sum(kind is not None for kind in (self.lora, self.residual, self.reft)) != 1:
            raise ConfigError(
                f"{self.label}: lora is {self.lora}, residual is {self.residual} and reft is {self.reft}; set exactly "
                "one of them."
            )
        self._check_after()
        if self.lora is not None:
            _check_trainable(self.name, self.lora)
        self._check_gates_before_user()
        self._check_start()
        self._check_loss()

    def _check_after(self) -> None:
        if not isinstance(self.after, list | tuple):
            raise ConfigError(
                f"{self.label}: after is {quoted(self.after)}; it must be a list of pairs, such as [('runs/a', 1.0)]."
            )
        for entry in self.after:
            is_pair = isinstance(entry, list | tuple) and len(entry) == 2
            if not (is_pair and isinstance(entry[0], LinkMember) and is_finite(entry[1])):
                raise ConfigError(
                    f"{self.label}: after has {quoted(entry)}; each entry is a folder, hub id, Adapter, LinkedResidual "
                    "or SteeringVector with a finite weight, such as ('runs/a', 1.0)."
                )

    def _check_gates_before_user(self) -> None:
        gates = self.gates_before_user
        if gates != "dropout" and not (is_finite(gates) and 0 <= gates <= 1):
            raise ConfigError(
                f"{self.label}: gates_before_user is {quoted(gates)}; it must be a number from 0 to 1, or 'dropout'."
            )
        if gates != 1 and (self.lora is None or self.invocation is not None):
            what = "a residual, which has no gates" if self.lora is None else "an aLoRA, off until its invocation"
            raise ConfigError(f"{self.label}: gates_before_user is {gates!r}, but it trains {what}. Leave it at 1.")

    def _check_loss(self) -> None:
        check_number(self.label, "dpo_beta", self.dpo_beta, above=0)
        for option, possible in (("loss", get_args(LossName)), ("turns", ("all", "last"))):
            value = getattr(self, option)
            if value not in possible:
                raise ConfigError(f"{self.label}: {option} is {quoted(value)}; choose one of {list(possible)}.")
        if self.loss == "dpo" and self.evaluation.best_by != "loss":
            raise ConfigError(
                f"{self.label}: best_by is {self.evaluation.best_by!r}, which pairs don't have. Set best_by='loss'."
            )

    def _check_start(self) -> None:
        check_number(self.label, "lora_plus_ratio", self.lora_plus_ratio, above=0)
        if self.lora_plus_ratio != 1 and self.lora is None:
            raise ConfigError(f"{self.label}: lora_plus_ratio is {self.lora_plus_ratio}, but it trains no LoRA.")
        if self.start not in get_args(Start):
            raise ConfigError(f"{self.label}: start is {quoted(self.start)}; choose one of {list(get_args(Start))}.")
        if self.start == "lora":
            return
        for reason, holds in {
            "it trains no LoRA": self.lora is None,
            "init_from has the first weights": self.init_from is not None,
            "use_dora is True": self.lora is not None and self.lora.use_dora,
            "an aLoRA is off until its invocation": self.invocation is not None,
            "gates_before_user is not 1": self.gates_before_user != 1,
        }.items():
            if holds:
                raise ConfigError(f"{self.label}: start is {self.start!r}, but {reason}. Set start='lora'.")

    @property
    def label(self) -> str:
        """What messages call it."""
        return f"job {self.name!r}"

    @property
    def invocation(self) -> tuple[int, ...] | None:
        """The tokens from which on an aLoRA is active."""
        return None if self.lora is None else self.lora.alora_invocation_tokens


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
    if lora.target_parameters:
        raise UnsupportedAdapterError(
            f"job {name!r}: target_parameters is {quoted(lora.target_parameters)}, and bare parameters can't be "
            "trained here: the gradients of stacked experts are not computed. Adapt modules (target_modules), or train "
            "it with PEFT; trained adapters of experts and routers can be loaded."
        )
    if not lora.contents.is_empty:
        raise UnsupportedAdapterError(
            f"job {name!r}: lora.contents is {lora.contents}; factors alone are trained. Leave it out."
        )
    if lora.use_dora and lora.lora_dropout > 0:
        raise UnsupportedAdapterError(
            f"job {name!r}: use_dora is True and lora_dropout is {lora.lora_dropout}; PEFT drops what the base weight "
            "reads then too, which rows of other adapters share. Set lora_dropout=0."
        )
    if lora.lora_dropout == 1:
        raise ConfigError(f"job {name!r}: lora_dropout is 1, which drops everything; use a value below 1.")
