"""Which norm a module computes, found by trying the few that there are."""

from collections.abc import Iterator
from dataclasses import dataclass
from inspect import signature
from typing import Any

from torch import Tensor, nn

from loraplex.kernels import native_parts
from loraplex.layers.fusion.agreement import TOLERANCE, distance, holds, random_inputs

_USUAL_EPSILONS = (1e-5, 1e-6)  # of modules that don't say theirs


@dataclass(frozen=True)
class NormTerms:
    """How a norm module turns its input into its output."""

    eps: float
    is_centered: bool  # LayerNorm; else it is a root mean square norm
    plus_one: bool  # it multiplies by 1 + weight


def may_be_norm(module: nn.Module) -> bool:
    """Whether it is called a norm, and has nothing but a weight and a bias."""
    if "norm" not in type(module).__name__.lower() or list(module.children()) or "forward" in vars(module):
        return False
    parameters = dict(module.named_parameters())
    tensors = [parameter for parameter in parameters.values() if parameter is not None]
    return set(parameters) <= {"weight", "bias"} and all(t.dtype in TOLERANCE and t.is_contiguous() for t in tensors)


def norm_terms(module: nn.Module, like: Tensor) -> NormTerms | None:
    """The terms that give what the module gives for inputs of every size, shaped as `like`; None for no known norm."""
    found = [(error, terms) for terms in _candidates(module) if (error := _error(module, terms, like)) is not None]
    return min(found, key=lambda pair: pair[0])[1] if found else None


def run_norm(module: nn.Module, terms: NormTerms, x: Tensor) -> Tensor:
    """What the compiled formula gives."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    return native_parts.norm(x.contiguous(), weight, bias, terms.eps, terms.is_centered, terms.plus_one)


def _candidates(module: nn.Module) -> Iterator[NormTerms]:
    eps = epsilon(module)
    for value in (eps,) if isinstance(eps, float) else _USUAL_EPSILONS:
        for is_centered in (False, True):
            yield NormTerms(value, is_centered, plus_one=False)
            if getattr(module, "weight", None) is not None:
                yield NormTerms(value, is_centered, plus_one=True)


def epsilon(module: nn.Module) -> Any:
    """What a module adds to the mean square, where it says so."""
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


def _error(module: nn.Module, terms: NormTerms, like: Tensor) -> float | None:
    """How far the formula is from the module; None: too far for some input."""
    worst = 0.0

    def agrees() -> bool:
        nonlocal worst
        worst = max(distance(run_norm(module, terms, x), module(x)) for x in random_inputs(*like.shape, like=like))
        return worst <= TOLERANCE[like.dtype]

    return worst if holds(agrees) else None


# Root mean square norms


def may_be_rms_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    takes_one_input = len(signature(type(module).forward).parameters) == 2  # itself, and x
    if not takes_one_input or "bias" in module._parameters:
        return False
    return may_be_norm(module) and isinstance(weight, Tensor) and weight.ndim == 1


def rms_terms(module: nn.Module) -> NormTerms | None:
    """None for another norm: torch computes LayerNorm in one operator as it is."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    terms = norm_terms(module, weight.new_empty(3, len(weight)))
    return None if terms is None or terms.is_centered else terms
