"""What learns: parameters in one flat tensor, optimizer, schedule, best weights and when to stop."""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from transformers import get_scheduler

from loraplex.errors import TrainingError

logger = logging.getLogger(__name__)

_SCHEDULERS = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}
_ZEROS_TO_WARN = 3  # steps in a row whose gradient is exactly 0
Quantity = Literal["loss", "gradients", "weights", "held-out loss"]
Finish = Literal["steps", "patience", "diverged"]


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


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """How training came to an end before its time."""

    step: int  # that found it, from 1 on
    what: Quantity  # was no longer finite
    loss: float
    grad_norm: float | None  # None: the loss is a held-out one
    last_good_step: int  # after which the weights that were kept still had a finite loss; 0: the first weights

    def as_json(self) -> dict[str, Any]:
        """A line of the log; JSON has no words for numbers that are not finite, so they are texts."""
        numbers = {"loss": str(self.loss), "grad_norm": None if self.grad_norm is None else str(self.grad_norm)}
        return {"step": self.step, "diverged": self.what, **numbers, "last_good_step": self.last_good_step}

    def __str__(self) -> str:
        norm = "" if self.grad_norm is None else f", the norm of its gradients {self.grad_norm}"
        return f"diverged in step {self.step}: its {self.what} became too large or NaN (its loss is {self.loss}{norm})"


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
    divergence: Divergence | None = None
    zero_gradients: int = 0  # of how many steps, up to the last, the gradient was exactly 0

    @property
    def zero_gradient_since(self) -> int | None:
        """The first of the last steps, up to now, that changed nothing."""
        return self.step - self.zero_gradients + 1 if self.zero_gradients else None


class TrainState:
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
    ) -> None:
        self._kind = kind
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
        self._good: Tensor | None = None  # the last parameters whose loss and gradients were finite
        self.progress = Progress()

    @property
    def is_finished(self) -> bool:
        return self.progress.finished is not None

    @property
    def has_diverged(self) -> bool:
        return self.progress.divergence is not None

    @property
    def learning_rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    @property
    def evaluates_now(self) -> bool:
        step = self.progress.step
        return (
            self._has_held_out
            and not self.has_diverged
            and (step % self._settings.eval_every == 0 or step == self.num_steps)
        )

    def update(self, loss: float, num_tokens: int, agree: Callable[[bool], bool] = bool) -> float:
        """Take the step that the gradients ask for; return their norm before clipping.

        Raises TrainingError where loss, gradients or new weights are not finite for any process, which `agree` tells;
        then it is finished, with its last good weights.
        """
        flat = self.flat
        max_norm = math.inf if self._settings.max_grad_norm is None else self._settings.max_grad_norm
        norm = float(torch.nn.utils.clip_grad_norm_([flat], max_norm))
        if agree(not (math.isfinite(loss) and math.isfinite(norm))):
            what: Quantity = "gradients" if math.isfinite(loss) else "loss"
            raise self._diverged(what, loss, norm, self._good, self.progress.step - 1)
        self._good = flat.detach().clone() if self._good is None else self._good.copy_(flat.detach())
        self.optimizer.step()
        if agree(not bool(torch.isfinite(flat.detach()).all())):
            raise self._diverged("weights", loss, norm, self._good, self.progress.step)
        self.scheduler.step()
        assert flat.grad is not None, "the flat gradient is never freed"
        flat.grad.zero_()
        self.progress.step += 1
        self.progress.num_tokens += num_tokens
        self.progress.train_losses.append(loss)
        if self.progress.step >= self.num_steps:
            self.progress.finished = "steps"
        self._watch_gradient(norm, loss)
        return norm

    def _diverged(
        self,
        what: Quantity,
        loss: float,
        norm: float | None,
        good: Tensor | None,
        good_step: int,
    ) -> TrainingError:
        """Finish with the last good weights, with patience the best; return what to raise."""
        progress = self.progress
        if self.best is not None:
            good, good_step = self.best, progress.best_step or 0
        if good is not None:
            self.flat.data.copy_(good)
        assert self.flat.grad is not None, "the flat gradient is never freed"
        self.flat.grad.zero_()
        step = progress.step if norm is None else progress.step + 1
        found = Divergence(step=step, what=what, loss=loss, grad_norm=norm, last_good_step=max(0, good_step))
        progress.divergence, progress.finished = found, "diverged"
        return TrainingError(f"{self.divergence_message()}.")

    def divergence_message(self) -> str:
        """What went wrong and what to try."""
        return (
            f"{self._kind} {self.name!r} {self.progress.divergence}. Lower its learning_rate "
            f"({self._settings.learning_rate}) or add warmup_steps"
        )

    def _watch_gradient(self, norm: float, loss: float) -> None:
        """Warn once of a gradient that stays exactly 0: whatever the loss is, nothing is learnt any more."""
        progress = self.progress
        progress.zero_gradients = progress.zero_gradients + 1 if norm == 0 else 0
        count = progress.zero_gradients
        if count == _ZEROS_TO_WARN or (0 < count < _ZEROS_TO_WARN and progress.finished is not None):
            reason = (
                "its loss is 0: it knows its records by heart"
                if loss == 0
                else "nothing that it trains acts on the tokens that count. Look at what it adapts and at its data"
            )
            logger.warning(
                "%s %r: the gradient is exactly 0 since step %d, so it learns nothing: %s.",
                *(self._kind, self.name, progress.zero_gradient_since, reason),
            )

    def record_evaluation(self, loss: float) -> None:
        """Note a held-out loss; stop after `patience` evaluations without a better one.

        Raises TrainingError where it is not finite, as `update` does.
        """
        progress = self.progress
        if not math.isfinite(loss):
            raise self._diverged("held-out loss", loss, None, self._good, progress.step - 1)
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
        if self._good is not None and not self.is_finished:
            tensors["good"] = self._good
        return tensors if self.best is None else tensors | {"best": self.best}

    def counters(self) -> dict[str, Any]:
        """What a checkpoint keeps as JSON."""
        return {"progress": asdict(self.progress), "scheduler": self.scheduler.state_dict()}

    def restore(self, tensors: Mapping[str, Tensor], counters: Mapping[str, Any]) -> None:
        """Become what `tensors` and `counters` were taken from."""
        flat = self.flat
        for name, tensor in tensors.items():
            if tensor.shape != (torch.Size() if name == "optimizer.step" else flat.shape):
                raise ValueError(f"{name!r} of {self._kind} {self.name!r} has shape {list(tensor.shape)}")
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
        self._good = tensors["good"].to(flat.device, copy=True) if "good" in tensors else None
        divergence = counters["progress"].get("divergence")  # as JSON has it
        found = None if divergence is None else Divergence(**divergence)
        self.progress = Progress(**{**counters["progress"], "divergence": found})
