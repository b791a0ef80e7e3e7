"""Norms and gated feed-forward modules of the frozen base, each one compiled operator in either direction.

As modules compute them, a norm is seven operators and ten more on the way back, each of which reads and writes all of
its values. A module is taken over if a formula gives what one of its kind gives (layers/fusion), and where its weights
are frozen in a CPU's memory; gradients round once, where the modules' round after every operator.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from loraplex.kernels import native_parts
from loraplex.kernels.dispatch import native_runs
from loraplex.layers.base.module_kinds import module_kind
from loraplex.layers.fusion.activations import activation_of, may_be_gated_mlp
from loraplex.layers.fusion.norms import may_be_rms_norm, rms_terms

Forward = Callable[[type[nn.Module], nn.Module, Tensor], Any]

_TERMS = "loraplex_training_terms"  # on a module: NormTerms or Activation
_FOUND = "loraplex_fused_in_training"  # on a model: those modules
_is_on: ContextVar[bool] = ContextVar("loraplex_fused_training", default=False)


@contextmanager
def fused_modules(base: PreTrainedModel) -> Iterator[None]:
    """Inside the block, passes of this thread run such modules as one operator each."""
    taken = []
    for module, forward in _found(base):
        former = type(module)
        if former not in _made and "forward" not in vars(module):  # offloading puts one there
            own = _subclass(former, forward)
            module.__class__ = own
            taken.append((module, former, own))
    token = _is_on.set(True)
    try:
        yield
    finally:
        _is_on.reset(token)
        for module, former, own in taken:
            if type(module) is own:  # else an engine came meanwhile, and gives back what it found
                module.__class__ = former


def _found(base: PreTrainedModel) -> list[tuple[nn.Module, Forward]]:
    """The modules that a formula computes, each with it; what is found is kept at the model."""
    if _FOUND not in vars(base):
        vars(base)[_FOUND] = _find(base) if native_runs(base.device, base.dtype) else []
    found: list[tuple[nn.Module, Forward]] = vars(base)[_FOUND]
    return found


@torch.no_grad()
def _find(base: PreTrainedModel) -> list[tuple[nn.Module, Forward]]:
    known: dict[Hashable, Any] = {}  # by kind; None: no formula gives what it gives
    found: list[tuple[nn.Module, Forward]] = []
    for module in base.modules():
        find: Callable[[nn.Module], Any]
        if may_be_rms_norm(module) and _is_frozen(module):
            find, forward = rms_terms, _norm_forward
        elif may_be_gated_mlp(module):
            find, forward = activation_of, _mlp_forward
        else:
            continue
        kind = module_kind(module)
        if kind not in known:
            known[kind] = find(module)
        if known[kind] is not None:
            vars(module)[_TERMS] = known[kind]
            found.append((module, forward))
    return found


def _is_frozen(module: nn.Module) -> bool:
    """Whether no weight is in training, or in parts on several processes."""
    parameters = [parameter for parameter in module._parameters.values() if parameter is not None]
    return all(type(one) is nn.Parameter and not one.requires_grad for one in parameters)


_made: set[type[nn.Module]] = set()
_subclasses: dict[tuple[type[nn.Module], Forward], type[nn.Module]] = {}


def _subclass(former: type[nn.Module], forward: Forward) -> type[nn.Module]:
    known = _subclasses.get((former, forward))
    if known is not None:
        return known

    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not _is_on.get() or kwargs or len(args) != 1 or not isinstance(args[0], Tensor):
            return former.forward(self, *args, **kwargs)
        return forward(former, self, args[0])

    run.__wrapped__ = former.forward  # type: ignore[attr-defined]  # for whoever asks for its signature
    made = type(former.__name__, (former,), {"forward": run, "__module__": former.__module__})
    _subclasses[former, forward] = made
    _made.add(made)
    return made


def _norm_forward(former: type[nn.Module], module: Any, x: Tensor) -> Any:
    if x.dtype != module.weight.dtype:
        return former.forward(module, x)
    terms = vars(module)[_TERMS]
    return _RmsNorm.apply(x, module.weight, terms.eps, terms.plus_one)


def _mlp_forward(former: type[nn.Module], module: Any, x: Tensor) -> Any:
    gate, up = module.gate_proj(x), module.up_proj(x)
    return module.down_proj(_GatedActivation.apply(gate, up, vars(module)[_TERMS]))


class _RmsNorm(torch.autograd.Function):
    """weight * x / sqrt(mean(x^2) + eps), or (1 + weight) * ..., of a frozen weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, plus_one: bool) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, weight)
        ctx.terms = eps, plus_one
        return native_parts.rms_norm(x, weight, eps, plus_one)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return native_parts.rms_norm_gradient(grad.contiguous(), x, weight, *ctx.terms), None, None, None


class _GatedActivation(torch.autograd.Function):
    """act(gate) * up; nothing but both is kept for the way back."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, kind: int) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        ctx.kind = kind
        return native_parts.gated_activation(gate, up, kind)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        return *native_parts.gated_activation_gradients(grad.contiguous(), gate, up, ctx.kind), None
