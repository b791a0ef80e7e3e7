"""One adapter job while it trains."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from loraplex.adapters.atomic_dir import check_destination
from loraplex.adapters.peft.config import CONFIG_FILE
from loraplex.adapters.peft.record import RECORD_FILE
from loraplex.adapters.peft.weight_files import WEIGHTS_FILE
from loraplex.adapters.prompt_centroid import CENTROID_FILE
from loraplex.residual.format import CONFIG_FILE as RESIDUAL_CONFIG_FILE
from loraplex.residual.format import WEIGHTS_FILE as RESIDUAL_WEIGHTS_FILE
from loraplex.training.adapters.config import AdapterJob
from loraplex.training.adapters.data import JobData
from loraplex.training.adapters.links import FrozenLink
from loraplex.training.adapters.parameters import Trainable
from loraplex.training.core.config import NEWER_EVALUATION, flat_options
from loraplex.training.core.rng import Purpose, generator
from loraplex.training.core.run_fingerprint import base_fingerprint
from loraplex.training.core.train_state import Optimizer, TrainState

REPLACEABLE = {
    *(CONFIG_FILE, WEIGHTS_FILE, RESIDUAL_CONFIG_FILE, RESIDUAL_WEIGHTS_FILE, RECORD_FILE, CENTROID_FILE),
    "README.md",
}
_NOT_COMPARED = ("name", "data", "eval_data", "init_from", "lora", "residual", "reft", "after")  # compared by content


# Options that checkpoints from before there were the options don't have, with the values that change nothing.
_NEWER = {
    **{"gates_before_user": 1, "start": "lora", "lora_plus_ratio": 1},
    **{"loss": "cross_entropy", "dpo_beta": 0.1, "turns": "all"},
}


class JobState(TrainState):
    """A job's parameters and all that decides its next step."""

    def __init__(
        self,
        job: AdapterJob,
        data: JobData,
        parameters: Trainable,
        frozen: FrozenLink | None = None,
    ) -> None:
        self.job = job
        self.data = data
        self.parameters = parameters
        self.frozen = frozen or FrozenLink()  # what its rows go through besides
        self.dropout = 0.0 if job.lora is None else job.lora.lora_dropout
        super().__init__(
            "job",
            job.name,
            Optimizer(parameters.flat, job.optimizer, data.num_steps, learning_rate_ratios(parameters, job)),
            job.evaluation,
            data.num_steps,
            has_held_out=bool(data.held_out),
        )

    def gate_before_user(self, number: int) -> float:
        """Of the tokens before the user's turn in the record of that number in the next step."""
        if self.job.gates_before_user != "dropout":
            return float(self.job.gates_before_user)
        draw = generator(self.job.seed, Purpose.GATES_BEFORE_USER, self.progress.step, number)
        return float(torch.randint(2, (), generator=draw))

    @property
    def evaluated_gate_before_user(self) -> float:
        """The same in an evaluation, where nothing is drawn."""
        return 1.0 if self.job.gates_before_user == "dropout" else float(self.job.gates_before_user)

    @property
    def is_fresh(self) -> bool:
        """Whether it began with weights of no adapter."""
        return self.job.init_from is None

    @property
    def title(self) -> str:
        return f"rank {self.parameters.rank}"

    @property
    def num_truncated(self) -> int:
        return sum(any(one.num_truncated for one in example.both) for example in self.data.train)

    def check_replaceable(self, folder: Path) -> None:
        check_destination(folder, "an adapter", REPLACEABLE, overwrite=True)

    def write(self, folder: Path) -> None:
        self.parameters.write(folder, self.data.end_tokens)

    def fingerprint(self) -> dict[str, Any]:
        """Everything that decides what the job learns, in JSON's types. Call it before the first step."""
        job = self.job
        options = {name: value for name, value in flat_options(job).items() if name not in _NOT_COMPARED}
        for name, default in {**_NEWER, **NEWER_EVALUATION}.items():
            if options[name] == default:
                del options[name]
        kind = {"residual": asdict(job.residual)} if job.residual is not None else {}
        if job.reft is not None:
            kind["reft"] = asdict(job.reft) | {"positions": str(job.reft.positions)}
        if job.lora is not None:  # which brings factors alone
            kind["lora"] = {name: value for name, value in asdict(job.lora).items() if name != "contents"}
        weights = self.flat.detach().cpu().numpy()
        return options | {
            **kind,
            "content of data": self.data.digest,
            "content of after": self.frozen.digest,
            "num_steps": self.data.num_steps,
            "first weights": hashlib.sha256(weights.tobytes()).hexdigest(),
        }


def learning_rate_ratios(parameters: Trainable, job: AdapterJob) -> Tensor | None:  # [parameters]
    """LoRA+: what the learning rate of each number is multiplied by; None: all by 1."""
    if job.lora_plus_ratio == 1:
        return None
    ratios = []
    for weights in parameters.slot_weights.values():
        ratios.append(torch.ones(weights.lora_a.numel()))
        others = weights.lora_b.numel() + (0 if weights.dora_scale is None else weights.dora_scale.numel())
        ratios.append(torch.full((others,), job.lora_plus_ratio))
    return torch.cat(ratios).to(parameters.flat.device)


def run_fingerprint(states: Sequence[JobState], base: PreTrainedModel) -> dict[str, Any]:
    """Everything that decides what a run learns, in JSON's types. Call it before the first step."""
    return {
        "base model": base_fingerprint(base),
        "names": [state.name for state in states],
        "jobs": {state.name: state.fingerprint() for state in states},
    }
