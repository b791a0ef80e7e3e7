"""What has become of a training: how far it is, how it ended, and what is returned."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Quantity = Literal["loss", "gradients", "weights", "held-out loss"]
Finish = Literal["steps", "patience", "diverged"]


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
    eval_exact: list[float] = field(default_factory=list)  # shares of records answered exactly; adapters alone
    evals_without_gain: int = 0
    best_step: int | None = None
    best_loss: float = math.inf
    best_exact: float = 0.0
    finished: Finish | None = None
    divergence: Divergence | None = None
    zero_gradients: int = 0  # of how many steps, up to the last, the gradient was exactly 0

    @property
    def zero_gradient_since(self) -> int | None:
        """The first of the last steps, up to now, that changed nothing."""
        return self.step - self.zero_gradients + 1 if self.zero_gradients else None


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What became of an adapter's job, or of a mixture's training."""

    name: str
    folder: Path  # the adapter or mixture in its format; of one that diverged, its last good weights: NAME.diverged
    log: Path  # JSON lines
    num_steps: int
    finished: Finish  # "steps": all of them; "patience": the held-out loss stopped falling; "diverged"
    train_losses: tuple[float, ...]  # one for each step; a mixture's without load balance and sparsity
    eval_steps: tuple[int, ...]
    eval_losses: tuple[float, ...]
    best_step: int | None  # of the best evaluation; with patience or keep_best, the step whose weights were written
    num_tokens: int  # of all records trained on, without padding
    num_truncated: int  # records that lost tokens on the left
    seconds: float  # of steps, evaluations excluded; shared with other jobs in the same batches
    divergence: Divergence | None = None  # in which step, and what was no longer finite
    eval_exact: tuple[float, ...] = ()  # shares of held-out records whose every answer token is the most likely one
    zero_gradient_since: int | None = None  # from this step to the last the gradient was exactly 0
