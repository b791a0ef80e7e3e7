"""What learns: a flat parameter with its optimizer, and above it progress, best weights and when to stop."""

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loraplex.errors import TrainingError
from loraplex.training.core.adamw import STEP, FlatAdamW
from loraplex.training.core.config import EvaluationConfig, OptimizerConfig
from loraplex.training.core.results import Divergence, Progress, Quantity

logger = logging.getLogger(__name__)

_SCHEDULERS = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}
_ZEROS_TO_WARN = 3  # steps in a row whose gradient is exactly 0


class Optimizer:
    """AdamW with a schedule on one flat parameter, whose gradient is zeroed after each step and never freed."""

    def __init__(
        self,
        flat: nn.Parameter,
        config: OptimizerConfig,
        num_steps: int,
        rate_ratios: Tensor | None = None,  # [parameters]  of learning rates; None: 1
    ) -> None:
        self.flat = flat
        self._rate_ratios = rate_ratios
        self.config = config
        from transformers import get_scheduler  # with it come peft and bitsandbytes, where they are installed

        self._flat_adamw = FlatAdamW(flat, config.learning_rate, config.weight_decay)
        self.adamw = self._flat_adamw.adamw
        self._scheduler = get_scheduler(
            _SCHEDULERS[config.schedule], self.adamw, config.warmup_steps, num_training_steps=num_steps
        )

    @property
    def learning_rate(self) -> float:
        return float(self.adamw.param_groups[0]["lr"])

    @property
    def gradient(self) -> Tensor:
        return self._flat_adamw.gradient

    def clip(self) -> float:
        """Clip the gradient; return its norm before."""
        return self._flat_adamw.clip(self.config.max_grad_norm)

    def step(self) -> None:
        """Take the step that the gradient asks for, and start the next one's from 0."""
        ratios = self._rate_ratios
        before = None if ratios is None else self.flat.detach().clone()
        self._flat_adamw.step()
        if before is not None and ratios is not None:  # an update, weight decay included, is a rate times something
            self.flat.data.copy_(torch.lerp(before, self.flat.detach(), ratios))
        self._scheduler.step()

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps as tensors."""
        return self._flat_adamw.tensors()

    def counters(self) -> dict[str, Any]:
        """What a checkpoint keeps as JSON."""
        return {"scheduler": self._scheduler.state_dict()}

    def restore(self, tensors: Mapping[str, Tensor], counters: Mapping[str, Any]) -> None:
        """Become what `tensors` and `counters` were taken from."""
        self._scheduler.load_state_dict(counters["scheduler"])
        self.adamw.param_groups[0]["lr"] = self._scheduler.get_last_lr()[0]
        self._flat_adamw.restore(tensors)


class TrainState(ABC):
    """An optimizer, and all that decides its next step and its end."""

    def __init__(
        self,
        kind: str,  # what messages call it: job, mixture
        name: str,
        optimizer: Optimizer,
        evaluation: EvaluationConfig,
        num_steps: int,
        *,
        has_held_out: bool,
    ) -> None:
        self._kind = kind
        self.name = name
        self.optimizer = optimizer
        self.flat = optimizer.flat
        self._evaluation = evaluation
        self.num_steps = num_steps
        self._has_held_out = has_held_out
        self.best: Tensor | None = None  # kept only with patience or keep_best
        self._good: Tensor | None = None  # the last parameters whose loss and gradients were finite
        self.progress = Progress()

    @property
    @abstractmethod
    def title(self) -> str:
        """What a plot says of it."""

    @property
    @abstractmethod
    def num_truncated(self) -> int:
        """How many records lost tokens on the left."""

    @abstractmethod
    def check_replaceable(self, folder: Path) -> None:
        """Raise AdapterExistsError now where `write` could not replace what is in `folder`."""

    @abstractmethod
    def write(self, folder: Path) -> None:
        """Write the weights as they are now, in their format; of one that diverged, those are the last good ones."""

    @property
    def is_finished(self) -> bool:
        return self.progress.finished is not None

    @property
    def has_diverged(self) -> bool:
        return self.progress.divergence is not None

    @property
    def evaluates_now(self) -> bool:
        step = self.progress.step
        return (
            self._has_held_out
            and not self.has_diverged
            and (step % self._evaluation.eval_every == 0 or step == self.num_steps)
        )

    def update(self, loss: float, num_tokens: int, agree: Callable[[bool], bool] = bool) -> float:
        """Take the step that the gradients ask for; return their norm before clipping.

        Raises TrainingError where loss, gradients or new weights are not finite for any process, which `agree` tells;
        then it is finished, with its last good weights.
        """
        flat, progress = self.flat, self.progress
        norm = self.optimizer.clip()
        if agree(not (math.isfinite(loss) and math.isfinite(norm))):
            what: Quantity = "gradients" if math.isfinite(loss) else "loss"
            raise self._diverged(what, loss, norm, progress.step - 1)
        self._good = flat.detach().clone() if self._good is None else self._good.copy_(flat.detach())
        self.optimizer.step()
        if agree(not _are_finite(flat.detach())):
            raise self._diverged("weights", loss, norm, progress.step)
        progress.step += 1
        progress.num_tokens += num_tokens
        progress.train_losses.append(loss)
        if progress.step >= self.num_steps:
            progress.finished = "steps"
        self._watch_gradient(norm, loss)
        return norm

    def _diverged(self, what: Quantity, loss: float, norm: float | None, good_step: int) -> TrainingError:
        """Finish with the last good weights, where the best are kept with those; return what to raise."""
        progress, good = self.progress, self._good
        if self.best is not None:
            good, good_step = self.best, progress.best_step or 0
        if good is not None:
            self.flat.data.copy_(good)
        self.optimizer.gradient.zero_()
        step = progress.step if norm is None else progress.step + 1
        found = Divergence(step=step, what=what, loss=loss, grad_norm=norm, last_good_step=max(0, good_step))
        progress.divergence, progress.finished = found, "diverged"
        return TrainingError(f"{self.divergence_message()}.")

    def divergence_message(self) -> str:
        """What went wrong and what to try."""
        return (
            f"{self._kind} {self.name!r} {self.progress.divergence}. Lower its learning_rate "
            f"({self.optimizer.config.learning_rate}) or add warmup_steps"
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

    def record_evaluation(self, loss: float, exact_match: float | None = None) -> None:
        """Note a held-out loss and share of exact answers; stop after `patience` evaluations without a better one.

        Raises TrainingError where it is not finite, as `update` does.
        """
        progress, evaluation = self.progress, self._evaluation
        if not math.isfinite(loss):
            raise self._diverged("held-out loss", loss, None, progress.step - 1)
        progress.eval_steps.append(progress.step)
        progress.eval_losses.append(loss)
        exact = 0.0
        if exact_match is not None:
            progress.eval_exact.append(exact_match)
            exact = exact_match if evaluation.best_by == "exact_match" else 0.0  # of equal ones the loss decides
        if (-exact, loss) < (-progress.best_exact, progress.best_loss):
            progress.best_exact, progress.best_loss, progress.best_step = exact, loss, progress.step
            progress.evals_without_gain = 0
            if evaluation.keeps_best:
                self.best = self.flat.detach().clone()
            return
        progress.evals_without_gain += 1
        if evaluation.patience is not None and progress.evals_without_gain >= evaluation.patience:
            progress.finished = "patience"

    def restore_best(self) -> None:
        """Where they are kept, go back to the weights of the best held-out loss."""
        if self.best is not None:
            self.flat.data.copy_(self.best)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps as tensors."""
        tensors = {"parameters": self.flat.detach()} | self.optimizer.tensors()
        if self._good is not None and not self.is_finished:
            tensors["good"] = self._good
        return tensors if self.best is None else tensors | {"best": self.best}

    def counters(self) -> dict[str, Any]:
        """What a checkpoint keeps as JSON."""
        return {"progress": asdict(self.progress)} | self.optimizer.counters()

    def restore(self, tensors: Mapping[str, Tensor], counters: Mapping[str, Any]) -> None:
        """Become what `tensors` and `counters` were taken from."""
        flat = self.flat
        for name, tensor in tensors.items():
            if tensor.shape != (torch.Size() if name == STEP else flat.shape):
                raise ValueError(f"{name!r} of {self._kind} {self.name!r} has shape {list(tensor.shape)}")
        flat.data.copy_(tensors["parameters"])
        self.optimizer.restore(tensors, counters)
        self.best = tensors["best"].to(flat.device, copy=True) if "best" in tensors else None
        self._good = tensors["good"].to(flat.device, copy=True) if "good" in tensors else None
        divergence = counters["progress"].get("divergence")  # as JSON has it
        found = None if divergence is None else Divergence(**divergence)
        self.progress = Progress(**{**counters["progress"], "divergence": found})


def _are_finite(values: Tensor) -> bool:
    """Whether none is infinite or NaN: neither has a finite sum, which is one pass over them instead of four."""
    return math.isfinite(float(values.sum())) or bool(torch.isfinite(values).all())
