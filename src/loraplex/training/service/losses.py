"""The losses that a client may name: what each token's log probability contributes, and the options of each loss.

The formulas are those of the Tinker API (tinker-docs.thinkingmachines.ai/tinker/losses). All are sums over tokens, so
that a client who wants a mean scales its weights or advantages.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from loraplex.errors import RequestError
from loraplex.validation import is_finite, listed, quoted

Inputs = Mapping[str, Tensor]  # each [tokens], or [tokens, k] beside k targets a token
Options = Mapping[str, float]

_CLIPS = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}  # PPO's epsilon of 0.2 (arXiv 1707.06347)
_ONE_SIDED = {"clip_low_threshold": 0.0, "clip_high_threshold": 4.0}  # of weights that are never 0 (arXiv 2510.13786)


@dataclass(frozen=True, kw_only=True)
class LossFunction:
    """A loss: the inputs that it needs and takes besides, its options with their defaults, and its terms."""

    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    options: Mapping[str, float] = field(default_factory=dict)
    takes_many_targets: bool = False  # several target tokens at each position
    terms: Callable[[Tensor, Inputs, Options], Tensor]  # of log probabilities [tokens]; their sum is the loss


@dataclass(frozen=True)
class ChosenLoss:
    """A loss with the options of one request."""

    name: str
    function: LossFunction
    options: Options

    def __call__(self, logprobs: Tensor, inputs: Inputs) -> Tensor:  # [tokens] or [tokens, k] -> scalar
        terms, weights = self.function.terms(logprobs, inputs, self.options), inputs.get("weights")
        return terms.sum() if weights is None else (terms * weights).sum()


def _cross_entropy(logprobs: Tensor, inputs: Inputs, options: Options) -> Tensor:
    return -logprobs


def _ratio(logprobs: Tensor, inputs: Inputs) -> Tensor:
    """p(x) / q(x): what the policy in training makes of tokens that another one has sampled."""
    return torch.exp(logprobs - inputs["logprobs"])


def _clipped(ratio: Tensor, inputs: Inputs, options: Options) -> Tensor:
    """The ratio within the request's thresholds, or within those of each token."""
    low = inputs.get("clip_low_threshold", options["clip_low_threshold"])
    high = inputs.get("clip_high_threshold", options["clip_high_threshold"])
    return torch.minimum(torch.maximum(ratio, torch.as_tensor(low)), torch.as_tensor(high))


def _importance_sampling(logprobs: Tensor, inputs: Inputs, options: Options) -> Tensor:
    return -_ratio(logprobs, inputs) * inputs["advantages"]


def _ppo(logprobs: Tensor, inputs: Inputs, options: Options) -> Tensor:
    ratio, advantages = _ratio(logprobs, inputs), inputs["advantages"]
    return -torch.minimum(ratio * advantages, _clipped(ratio, inputs, options) * advantages)


def _cispo(logprobs: Tensor, inputs: Inputs, options: Options) -> Tensor:
    """The clipped ratio weighs the policy gradient and has none itself (arXiv 2506.13585)."""
    clipped = _clipped(_ratio(logprobs, inputs), inputs, options)
    return -clipped.detach() * logprobs * inputs["advantages"]


def _dro(logprobs: Tensor, inputs: Inputs, options: Options) -> Tensor:
    """A quadratic penalty keeps the policy near the sampler (arXiv 2405.19107)."""
    penalty = 0.5 * options["beta"] * (logprobs - inputs["logprobs"]) ** 2
    return penalty - logprobs * inputs["advantages"]


def _gspo(logprobs: Tensor, inputs: Inputs, options: Options) -> Tensor:
    """One ratio for the whole sequence, the geometric mean over the masked tokens (arXiv 2507.18071, GSPO-token)."""
    masked = inputs["sequence_ratio_mask"] != 0
    log_ratio = (
        (logprobs.detach() - inputs["logprobs"])[masked].mean() if bool(masked.any()) else logprobs.new_zeros(())
    )
    ratio = torch.exp(log_ratio + logprobs - logprobs.detach())
    advantages = inputs["advantages"]
    return -torch.minimum(ratio * advantages, _clipped(ratio, inputs, options) * advantages)


_POLICY = ("logprobs", "advantages")
LOSSES: Mapping[str, LossFunction] = {
    "cross_entropy": LossFunction(optional=("weights",), takes_many_targets=True, terms=_cross_entropy),
    "importance_sampling": LossFunction(required=_POLICY, optional=("weights",), terms=_importance_sampling),
    "ppo": LossFunction(required=_POLICY, optional=("weights", *_CLIPS), options=_CLIPS, terms=_ppo),
    "cispo": LossFunction(required=_POLICY, optional=("weights", *_CLIPS), options=_ONE_SIDED, terms=_cispo),
    "dro": LossFunction(required=_POLICY, optional=("weights",), options={"beta": 0.05}, terms=_dro),
    "gspo": LossFunction(
        required=(*_POLICY, "sequence_ratio_mask"), optional=("weights", *_CLIPS), options=_CLIPS, terms=_gspo
    ),
}
_ELSEWHERE = {
    "stable_reinforce": "its formula isn't public; use importance_sampling, ppo, cispo or gspo instead",
    "custom": "losses that run on the server aren't taken; the client's forward_backward_custom runs them beside it",
}


def choose_loss(name: str, given: Mapping[str, object]) -> ChosenLoss:
    """The loss of a request. Raises RequestError for one that isn't known, and for options that it doesn't take."""
    function = LOSSES.get(name)
    if function is None:
        reason = _ELSEWHERE.get(name, "it isn't known")
        raise RequestError(f"loss_fn is {quoted(name)}: {reason}. Possible: {sorted(LOSSES)}.")
    for option, value in given.items():
        if option not in function.options:
            raise RequestError(
                f"loss_fn_config has {quoted(option)}, which {name} doesn't take. It takes {sorted(function.options)}."
            )
        if not is_finite(value):
            raise RequestError(f"loss_fn_config: {option} is {quoted(value)}; it must be a finite number.")
    options = {**function.options, **given}
    if options.get("clip_low_threshold", 0) > options.get("clip_high_threshold", 0):  # type: ignore[operator]
        raise RequestError(
            f"loss_fn_config: clip_low_threshold is {options['clip_low_threshold']}, above clip_high_threshold "
            f"({options['clip_high_threshold']})."
        )
    return ChosenLoss(name, function, options)  # type: ignore[arg-type]


def check_inputs(loss: ChosenLoss, names: set[str], place: str) -> None:
    """Raise RequestError, which starts with `place`, for tensors that the loss lacks or doesn't take."""
    function = loss.function
    missing = [name for name in function.required if name not in names]
    if missing:
        raise RequestError(f"{place}: loss_fn_inputs lacks {listed(missing)}, which {loss.name} needs.")
    unknown = names - {*function.required, *function.optional}
    if unknown:
        known = sorted({"target_tokens", *function.required, *function.optional})
        raise RequestError(f"{place}: loss_fn_inputs has {listed(unknown)}; {loss.name} takes {known}.")
