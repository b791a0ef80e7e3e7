"""The experts of a layer and the router that chooses among them, read off a pass and found by trying."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from loraplex.engine.worker.fusion.layer_parts import (
    ExpertGate,
    ExpertsPart,
    RouterPart,
    Scores,
    is_readable,
    linear_shape,
    numbers_of,
)
from loraplex.engine.worker.fusion.part_run import PartRun
from loraplex.layers.base.parameters import has_stacked_experts, parameter_names
from loraplex.layers.fusion.agreement import SCALES, TOLERANCE, distance

_TOKENS = 32  # that a router is tried on


@dataclass(frozen=True)
class ExpertRuns:
    """How a layer's experts ran in a pass."""

    router: PartRun
    experts: PartRun
    output: Tensor  # of the module around both, which may add what all tokens share

    def holds(self, run: PartRun) -> bool:
        """Whether a run is one of theirs."""
        return any(run.path == own.path or run.path.startswith(f"{own.path}.") for own in (self.router, self.experts))


def find_experts(runs: Sequence[PartRun]) -> ExpertRuns | None:
    """The experts among the parts of a layer, with the router that chose among them; None without one of each."""
    experts = [run for run in runs if has_stacked_experts(run.module)]
    if len(experts) != 1:
        return None
    (own,) = experts
    given = [value for value in (*own.args, *own.kwargs.values()) if _are_numbers(value)]
    routers = [
        run for run in runs if isinstance(run.returned, tuple) and _holds(run.returned, given) and run is not own
    ]
    if not routers:
        return None
    around = [run for run in runs if own.path.startswith(f"{run.path}.") and run.output.numel() == own.output.numel()]
    return ExpertRuns(routers[0], own, around[-1].output if around else own.output)


def read_experts(layer: nn.Module, runs: ExpertRuns, shared_gate: str | None, dtype: torch.dtype) -> ExpertsPart | None:
    """Their parts, with the first way in which they may be gated; None if they have others."""
    module: Any = runs.experts.module
    router = read_router(layer, runs.router, dtype)
    if router is None or module.has_post_expert_norm or getattr(module, "_is_expert_parallel", False):
        return None
    names = parameter_names(module)
    known = {*names, *(f"{name}_bias" for name in names if module.has_bias)}
    parameters = dict(module.named_parameters())
    if set(parameters) != known or not all(is_readable(parameter, dtype) for parameter in parameters.values()):
        return None
    if any(parameters[name].ndim != 3 or len(parameters[name]) != router.num_experts for name in names):
        return None
    gate = ExpertGate.HALVES if module.has_gate else ExpertGate.NONE
    return ExpertsPart(
        path=runs.experts.path, input=names[0], down=names[1], router=router, gate=gate, shared_gate=shared_gate
    )


def expert_candidates(layer: nn.Module, part: ExpertsPart) -> Iterator[ExpertsPart]:
    """The gates that experts may have, and the numbers by which the modules around them may multiply."""
    module, own = layer.get_submodule(part.path), part.router
    around = part.path.rpartition(".")[0]
    factors = numbers_of(layer.get_submodule(around)) if around else [1.0]
    for factor in factors:
        router = replace(own, factor=own.factor * factor)
        yield replace(part, router=router)
        alpha, limit = (getattr(module, name, None) for name in ("alpha", "limit"))
        if part.gate is ExpertGate.HALVES and isinstance(alpha, float) and isinstance(limit, float):
            yield replace(part, router=router, gate=ExpertGate.CLAMPED_PAIRS, alpha=alpha, limit=limit)


# Routers


def read_router(layer: nn.Module, run: PartRun, dtype: torch.dtype) -> RouterPart | None:
    """How a router chooses; None if by no known rule. What it adds to scores is told by putting other values there."""
    module, logits = run.module, run.output
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not is_readable(weight, dtype):
        return None
    if logits.shape[-1] != len(weight) or not (bias is None or is_readable(bias, dtype)):
        return None
    chosen = next(value for value in run.returned if _are_numbers(value))
    corrections = _corrections(layer, run, len(weight))
    trial = _RouterTrial(run, corrections, dtype)
    part = RouterPart(
        path=run.path,
        num_experts=len(weight),
        top_k=chosen.shape[-1],
        scores=Scores.SOFTMAX,
        normalises=False,
        rounds=trial.rounds,
    )
    return next(filter(trial.agrees, _router_candidates(module, part, tuple(corrections))), None)


def _router_candidates(module: nn.Module, part: RouterPart, corrections: Sequence[str]) -> Iterator[RouterPart]:
    integers = [value for value in vars(module).values() if isinstance(value, int) and not isinstance(value, bool)]
    groups = dict.fromkeys((g, top) for g in integers for top in integers if _may_be_groups(g, top, part))
    ways = product((None, *corrections), ((1, 1), *groups), numbers_of(module), Scores, (True, False))
    for correction, (num_groups, top_groups), factor, scores, normalises in ways:
        yield replace(
            part,
            correction=correction,
            num_groups=num_groups,
            top_groups=top_groups,
            factor=factor,
            scores=scores,
            normalises=normalises,
        )


def _may_be_groups(num_groups: int, top_groups: int, part: RouterPart) -> bool:
    size = part.num_experts // num_groups if num_groups > 1 else 0
    return size > 1 and size * num_groups == part.num_experts and part.top_k <= size * top_groups < part.num_experts


def _corrections(layer: nn.Module, run: PartRun, num_experts: int) -> dict[str, Tensor]:
    """Tensors of a number for each expert that the router has or is given, by their paths in the layer."""
    own = {id(tensor) for tensor in (*run.module.parameters(), *run.module.buffers(), *run.args, *run.kwargs.values())}
    own -= {id(run.module.weight), id(getattr(run.module, "bias", None))}
    tensors = (*layer.named_parameters(), *layer.named_buffers())
    return {
        path: tensor
        for path, tensor in tensors
        if id(tensor) in own and tensor.numel() == num_experts and tensor.is_floating_point()
    }


class _RouterTrial:
    """A copy of a router, with random values in the place of those which it may add to scores."""

    def __init__(self, run: PartRun, corrections: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        draw = torch.Generator().manual_seed(0)
        memo: dict[int, Any] = {}
        module = copy.deepcopy(run.module, memo)
        self._dtype = dtype
        self._values: dict[str, Tensor] = {}
        replaced: dict[int, Tensor] = {}
        for path, tensor in corrections.items():
            random = torch.rand(tensor.shape, generator=draw).to(tensor)
            memo.get(id(tensor), random).copy_(random)
            self._values[path] = replaced[id(tensor)] = random
        self._passes = []
        for scale in SCALES:
            x = (torch.randn(_TOKENS, run.input.shape[-1], generator=draw) * scale).to(run.input)
            args = [replaced.get(id(value), x if _is_same_input(value, run) else value) for value in run.args]
            kwargs = {
                name: replaced.get(id(value), x if _is_same_input(value, run) else value)
                for name, value in run.kwargs.items()
            }
            returned = module.forward(*args, **kwargs)
            numbers = next(value for value in returned if _are_numbers(value))
            weights = next(value for value in returned[1:] if value.shape == numbers.shape and value is not numbers)
            dense = torch.zeros(len(x), returned[0].shape[-1]).scatter(1, numbers, weights.float())
            self._passes.append((returned[0].float(), dense))
        self.rounds = dtype != torch.float32 and all(
            torch.equal(logits.to(dtype).float(), logits) for logits, _ in self._passes
        )

    def agrees(self, part: RouterPart) -> bool:
        """Whether it chooses as the router did, but for tokens between two experts."""
        correction = None if part.correction is None else self._values[part.correction].float().flatten()
        for logits, theirs in self._passes:
            clear = ~near_ties(logits, part, correction, self._dtype) & theirs.isfinite().all(dim=-1)  # not 0 / 0
            ours = weights_of(logits, part, correction)
            if clear.any() and not distance(ours[clear], theirs[clear]) <= TOLERANCE[self._dtype]:
                return False
        return any(near_ties(logits, part, correction, self._dtype).sum() < len(logits) for logits, _ in self._passes)


def weights_of(logits: Tensor, part: RouterPart, correction: Tensor | None) -> Tensor:  # [tokens, experts] both
    """The weight of every expert for each token; 0 of those not chosen. As kernels/csrc/experts.h has it."""
    scores = _scores(logits, part)
    choice, _ = _choice(scores, part, correction)
    chosen = choice.topk(part.top_k, dim=-1).indices
    weights = scores.gather(1, chosen)
    if part.normalises:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return torch.zeros_like(scores).scatter(1, chosen, part.factor * weights)


def near_ties(logits: Tensor, part: RouterPart, correction: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Which tokens [tokens] stand so near between two experts that rounding may decide, of logits [tokens, experts].

    Not those to which either of the two would give nothing, beside the best expert, that float32 can hold.
    """
    scores = _scores(logits.float(), part)
    error = 2 * _rounding(dtype) * logits.float().abs().amax(dim=-1, keepdim=True)
    errors = scores * (1 - scores) * error + torch.finfo(torch.float32).eps
    choice, near = _choice(scores, part, correction, errors)
    return near | _are_near(choice, errors, part.top_k) & ~_weighs_nothing(scores, choice, part.top_k)


def _weighs_nothing(scores: Tensor, choice: Tensor, count: int) -> Tensor:
    """Of which tokens the last of `count` chosen experts, and the next one, weigh nothing beside the best."""
    best = scores.amax(dim=-1, keepdim=True)
    places = choice.topk(min(count + 1, choice.shape[-1]), dim=-1).indices[:, -2:]
    return (scores.gather(1, places) <= torch.finfo(torch.float32).eps * best).all(dim=-1)


def _rounding(dtype: torch.dtype) -> float:
    return 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps


def _scores(logits: Tensor, part: RouterPart) -> Tensor:
    return logits.sigmoid() if part.scores is Scores.SIGMOID else logits.softmax(dim=-1)


def _choice(
    scores: Tensor, part: RouterPart, correction: Tensor | None, errors: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What the choice goes by [tokens, experts], and of which tokens groups are near each other."""
    choice = scores if correction is None else scores + correction
    near = torch.zeros(len(scores), dtype=torch.bool)
    if part.top_groups == part.num_groups:
        return choice, near
    best, places = choice.view(len(choice), part.num_groups, -1).topk(2, dim=-1)
    sums = best.sum(dim=-1)
    if errors is not None:
        group_errors = errors.view(len(choice), part.num_groups, -1).gather(2, places).sum(dim=-1)
        near = _are_near(sums, group_errors, part.top_groups)
    kept = torch.zeros_like(sums).scatter(1, sums.topk(part.top_groups, dim=-1).indices, 1.0).bool()
    size = part.num_experts // part.num_groups
    return choice.masked_fill(~kept.repeat_interleave(size, dim=1), -torch.inf), near


def _are_near(values: Tensor, errors: Tensor, count: int) -> Tensor:  # [tokens, n] both
    """Of which tokens the last of the `count` largest values is no more above the next one than their errors."""
    if count >= values.shape[-1]:
        return torch.zeros(len(values), dtype=torch.bool)
    largest, places = values.topk(count + 1, dim=-1)
    own = errors.gather(1, places)[:, -2:].sum(dim=-1)
    return largest[:, -2] - largest[:, -1] <= own


def is_shared_gate(run: PartRun) -> bool:
    """Whether a linear module gives one number."""
    return linear_shape(run.module)[0] == 1


def _are_numbers(value: object) -> bool:
    return isinstance(value, Tensor) and value.ndim == 2 and value.dtype in (torch.int32, torch.int64)


def _holds(returned: Sequence[Any], given: Sequence[Any]) -> bool:
    return any(value is one for value in returned for one in given)


def _is_same_input(value: object, run: PartRun) -> bool:
    return isinstance(value, Tensor) and value.shape == run.input.shape and torch.equal(value, run.input)
