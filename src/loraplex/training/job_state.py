"""One job while it trains: weights, optimizer, schedule, best weights and when to stop."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import get_scheduler

from loraplex.adapters.slots import SlotWeights
from loraplex.adapters.weights import LoraWeights
from loraplex.errors import TrainingError
from loraplex.training.config import AdapterJob
from loraplex.training.dataset import JobData
from loraplex.training.parameters import FlatParameters

_SCHEDULERS = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}
Finish = Literal["steps", "patience"]


@dataclass(kw_only=True)
class Progress:
    """What a job has done so far."""

    step: int = 0
    num_tokens: int = 0  # of all records trained on, without padding
    seconds: float = 0.0  # of steps, evaluations excluded
    train_losses: list[float] = field(default_factory=list)
    eval_steps: list[int] = field(default_factory=list)
    eval_losses: list[float] = field(default_factory=list)
    evals_without_gain: int = 0
    best_step: int | None = None
    best_loss: float = math.inf
    finished: Finish | None = None


class JobState:
    """A job's parameters and all that decides its next step."""

    def __init__(
        self,
        job: AdapterJob,
        data: JobData,
        first_weights: Mapping[str, LoraWeights],
        module_index: Mapping[str, int],
        embed_scales: Mapping[str, float],
        device: torch.device,
    ) -> None:
        self.job = job
        self.data = data
        self.parameters = FlatParameters(first_weights, device)
        self.slot_weights: dict[int, SlotWeights] = self.parameters.slot_weights(module_index, embed_scales)
        flat = self.parameters.flat
        self.optimizer = torch.optim.AdamW([flat], job.learning_rate, weight_decay=job.weight_decay, fused=True)
        self.scheduler = get_scheduler(
            _SCHEDULERS[job.schedule], self.optimizer, job.warmup_steps, num_training_steps=data.num_steps
        )
        self.best: Tensor | None = None  # kept only with patience
        self.progress = Progress()

    @property
    def is_finished(self) -> bool:
        return self.progress.finished is not None

    @property
    def learning_rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    @property
    def evaluates_now(self) -> bool:
        step = self.progress.step
        return bool(self.data.held_out) and (step % self.job.eval_every == 0 or step == self.data.num_steps)

    def update(self, loss: float, num_tokens: int) -> float:
        """Take the step that the gradients ask for; return their norm before clipping.

        Raises TrainingError.
        """
        flat = self.parameters.flat
        max_norm = math.inf if self.job.max_grad_norm is None else self.job.max_grad_norm
        norm = float(torch.nn.utils.clip_grad_norm_([flat], max_norm))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainingError(
                f"job {self.job.name!r} diverged at step {self.progress.step}: its loss is {loss}, the norm "
                f"of its gradients {norm}. Lower its learning_rate ({self.job.learning_rate}) or add "
                "warmup_steps; the other jobs go on from the last checkpoint in a run without it, with "
                "another output folder."
            )
        self.optimizer.step()
        self.scheduler.step()
        assert flat.grad is not None, "the flat gradient is never freed"
        flat.grad.zero_()
        self.progress.step += 1
        self.progress.num_tokens += num_tokens
        self.progress.train_losses.append(loss)
        if self.progress.step >= self.data.num_steps:
            self.progress.finished = "steps"
        return norm

    def record_evaluation(self, loss: float) -> None:
        """Note a held-out loss; stop after `patience` evaluations without a better one."""
        progress = self.progress
        progress.eval_steps.append(progress.step)
        progress.eval_losses.append(loss)
        if loss < progress.best_loss:
            progress.best_loss, progress.best_step, progress.evals_without_gain = loss, progress.step, 0
            if self.job.patience is not None:
                self.best = self.parameters.flat.detach().clone()
            return
        progress.evals_without_gain += 1
        if self.job.patience is not None and progress.evals_without_gain >= self.job.patience:
            progress.finished = "patience"

    def restore_best(self) -> None:
        """With patience, go back to the weights of the best held-out loss."""
        if self.best is not None:
            self.parameters.flat.data.copy_(self.best)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps as tensors."""
        flat = self.parameters.flat
        tensors = {"parameters": flat.detach()}
        tensors |= {f"optimizer.{name}": value for name, value in self.optimizer.state[flat].items()}
        return tensors if self.best is None else tensors | {"best": self.best}

    def counters(self) -> dict[str, Any]:
        """What a checkpoint keeps as JSON."""
        return {"progress": asdict(self.progress), "scheduler": self.scheduler.state_dict()}

    def restore(self, tensors: Mapping[str, Tensor], counters: Mapping[str, Any]) -> None:
        """Become what `tensors` and `counters` were taken from."""
        flat = self.parameters.flat
        flat.data.copy_(tensors["parameters"])
        self.scheduler.load_state_dict(counters["scheduler"])
        self.optimizer.param_groups[0]["lr"] = self.scheduler.get_last_lr()[0]
        prefix = "optimizer."
        self.optimizer.state[flat] = {
            name.removeprefix(prefix): tensor.to(flat.device, copy=True)
            for name, tensor in tensors.items()
            if name.startswith(prefix)
        }
        self.best = tensors["best"].to(flat.device, copy=True) if "best" in tensors else None
        self.progress = Progress(**counters["progress"])
