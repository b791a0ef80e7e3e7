"""What a linear router's training has beside what all mixtures have."""

from dataclasses import dataclass
from typing import Literal, get_args

from loraplex.errors import ConfigError
from loraplex.training.core.checks import check_flags, check_number
from loraplex.validation import quoted

FirstWeights = Literal["kept", "noise", "arrow", "spectr"]
_LABEL = "router training"


@dataclass(frozen=True, kw_only=True)
class RouterTrainConfig:
    """How a linear router begins, and what it learns from.

    The loss is answer_weight * the answers' cross-entropy + gate_kl_weight * KL(teacher's gates || router's) +
    logit_kl_weight * KL(teacher's answer logits || mixture's), the last two with a teacher only, and regularizers.
    """

    first_weights: FirstWeights = "kept"  # as the mixture has them; or small noise, or the experts' directions
    train_experts: bool = False  # the experts' factors too
    z_loss_weight: float = 0.0  # of regularizers.router_z_loss
    teacher: str | None = None  # a loaded X-LoRA, whose experts have the names of the router's
    answer_weight: float = 1.0
    gate_kl_weight: float = 1.0
    logit_kl_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.first_weights not in get_args(FirstWeights):
            raise ConfigError(
                f"first_weights is {quoted(self.first_weights)}; choose one of {list(get_args(FirstWeights))}."
            )
        check_flags(self, ("train_experts",))
        for option in ("z_loss_weight", "answer_weight", "gate_kl_weight", "logit_kl_weight"):
            check_number(_LABEL, option, getattr(self, option), minimum=0)
        follows_base = self.answer_weight > 0 or (self.teacher is not None and self.logit_kl_weight > 0)
        if not follows_base and (self.teacher is None or self.gate_kl_weight == 0):
            raise ConfigError(
                "nothing is learnt: answer_weight is 0, and no teacher's gates or logits count. Raise a weight."
            )
        if self.train_experts and not follows_base:
            raise ConfigError(
                "train_experts is True, but only the teacher's gates count, which say nothing of the experts' factors. "
                "Raise answer_weight or logit_kl_weight."
            )
        if self.teacher is None and self.logit_kl_weight > 0:
            raise ConfigError(f"logit_kl_weight is {self.logit_kl_weight}, but there is no teacher. Give one, or 0.")
