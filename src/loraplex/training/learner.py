"""What learns: parameters in one flat tensor, optimizer, schedule, best weights and when to stop."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from transformers import get_scheduler

from loraplex.errors import TrainingError

_SCHEDULERS = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}
Finish = Literal["steps", "patience"]


class Optimisation(Protocol):
    """The settings that decide how parameters are updated: those of an AdapterJob or a MixtureTrainConfig."""

    @property
    def learning_rate(self) -> float: ...
    @property
    def schedule(self) -> Literal["constant", "linear", "cosine"]: ...
    @property
    def warmup_steps(self) -> int: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def max_grad_norm(self) -> float | None: ...
    @property
    def patience(self) -> int | None: ...
    @property
    def eval_every(self) -> int: ...


@dataclass(kw_only=True)
class Progress:
    """What has been done so far."""

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


class Learner:
    """Parameters and all that decides their next step."""

    def __init__(
        self,
        kind: str,  # what messages call it: job, mixture
        name: str,
        settings: Optimisation,
        flat: nn.Parameter,  # with a gradient that is never freed
        num_steps: int,
        *,
        has_held_out: bool,
        advice: str = "",  # what else to do when it diverges
    ) -> None:
        self._kind = kind
        self._advice = advice
        self.name = name
        self._settings = settings
        self.flat = flat
        self.num_steps = num_steps
        self._has_held_out = has_held_out
        self.optimizer = torch.optim.AdamW(
            [flat], settings.learning_rate, weight_decay=settings.weight_decay, fused=True
        )
        self.scheduler = get_scheduler(
            _SCHEDULERS[settings.schedule], self.optimizer, settings.warmup_steps, num_training_steps=num_steps
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
        return self._has_held_out and (step % self._settings.eval_every == 0 or step == self.num_steps)

    def update(self, loss: float, num_tokens: int) -> float:
        """Take the step that the gradients ask for; return their norm before clipping.

        Raises TrainingError.
        """
        flat = self.flat
        max_norm = math.inf if self._settings.max_grad_norm is None else self._settings.max_grad_norm
        norm = float(torch.nn.utils.clip_grad_norm_([flat], max_norm))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainingError(
                f"{self._kind} {self.name!r} diverged at step {self.progress.step}: its loss is {loss}, the norm "
                f"of its gradients {norm}. Lower its learning_rate ({self._settings.learning_rate}) or add "
                f"warmup_steps.{self._advice}"
            )
        self.optimizer.step()
        self.scheduler.step()
        assert flat.grad is not None, "the flat gradient is never freed"
        flat.grad.zero_()
        self.progress.step += 1
        self.progress.num_tokens += num_tokens
        self.progress.train_losses.append(loss)
        if self.progress.step >= self.num_steps:
            self.progress.finished = "steps"
        return norm

    def record_evaluation(self, loss: float) -> None:
        """Note a held-out loss; stop after `patience` evaluations without a better one."""
        progress = self.progress
        progress.eval_steps.append(progress.step)
        progress.eval_losses.append(loss)
        if loss < progress.best_loss:
            progress.best_loss, progress.best_step, progress.evals_without_gain = loss, progress.step, 0
            if self._settings.patience is not None:
                self.best = self.flat.detach().clone()
            return
        progress.evals_without_gain += 1
        if self._settings.patience is not None and progress.evals_without_gain >= self._settings.patience:
            progress.finished = "patience"

    def restore_best(self) -> None:
        """With patience, go back to the weights of the best held-out loss."""
        if self.best is not None:
            self.flat.data.copy_(self.best)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps as tensors."""
        flat = self.flat
        tensors = {"parameters": flat.detach()}
        tensors |= {f"optimizer.{name}": value for name, value in self.optimizer.state[flat].items()}
        return tensors if self.best is None else tensors | {"best": self.best}

    def counters(self) -> dict[str, Any]:
        """What a checkpoint keeps as JSON."""
        return {"progress": asdict(self.progress), "scheduler": self.scheduler.state_dict()}

    def restore(self, tensors: Mapping[str, Tensor], counters: Mapping[str, Any]) -> None:
        """Become what `tensors` and `counters` were taken from."""
        flat = self.flat
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
