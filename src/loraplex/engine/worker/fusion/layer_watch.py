"""Reading a decoder layer's parts off one pass through it: which module reads what another one made."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from loraplex.engine.kv.kv_cache import KeyValueCache
from loraplex.engine.worker.fusion.expert_parts import ExpertRuns, find_experts, is_shared_gate, read_experts
from loraplex.engine.worker.fusion.layer_parts import (
    AttentionPart,
    ExpertsPart,
    Gating,
    LayerParts,
    MlpPart,
    NormPart,
    Projection,
    is_plain_linear,
    linear_shape,
)
from loraplex.engine.worker.fusion.part_run import PartRun
from loraplex.layers.fusion.activations import Activation
from loraplex.layers.fusion.norms import may_be_norm, norm_terms

logger = logging.getLogger(__name__)


class LayerWatch:
    """Notes how the parts of layers run, in their order, innermost first."""

    def __init__(self, layers: Sequence[nn.Module], wanted: Callable[[], bool]) -> None:
        """Only in passes that are `wanted`."""
        self._wanted = wanted
        self._runs: list[PartRun] = []
        self._handles = [
            module.register_forward_hook(self._note(path), with_kwargs=True)
            for layer in layers
            for path, module in layer.named_modules()
            if path
        ]

    def take(self) -> list[PartRun]:
        """What was noted since the last time."""
        runs, self._runs = self._runs, []
        return runs

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _note(self, path: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], returned: Any) -> None:
            if not self._wanted():
                return
            tensors = (value for value in (*args, *kwargs.values()) if _is_hidden(value))
            given, made = next(tensors, None), returned[0] if isinstance(returned, (tuple, list)) else returned
            if given is not None and _is_hidden(made):
                self._runs.append(PartRun(path, module, given.clone(), made.clone(), args, kwargs, returned))

        return note


def _is_hidden(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim >= 2


class _Unknown(Exception):
    """A layer has something that the formula doesn't have."""


def read_attention(attention: PartRun, runs: Sequence[PartRun], cache: KeyValueCache) -> AttentionPart | None:
    """The parts of an attention module; None if it has others. `runs` are those of a layer or of the module itself."""
    try:
        return _attention(attention, _inside(runs, attention), cache)
    except _Unknown:
        return None


def read_layer(layer: nn.Module, hidden: Tensor, runs: Sequence[PartRun], cache: KeyValueCache) -> LayerParts | None:
    """The parts of a layer that ran on `hidden`, its activation and numbers being the first of those it may have."""
    attentions = [run for run in runs if run.module in cache.shapes]
    if len(attentions) != 1:
        return None
    try:
        parts = _layer(layer, hidden, attentions[0], runs, cache)
    except _Unknown:
        return None
    known = {id(parameter) for path in parts.paths() for parameter in layer.get_submodule(path).parameters()}
    sinks = cache.shapes[attentions[0].module].terms.sinks  # which the formula knows
    others = [parameter for parameter in layer.parameters() if id(parameter) not in known]
    has_others = any(sinks is None or parameter.data_ptr() != sinks.data_ptr() for parameter in others)
    return None if has_others else parts


def _inside(runs: Sequence[PartRun], outer: PartRun) -> list[PartRun]:
    return [run for run in runs if run.path.startswith(f"{outer.path}.") or not outer.path]


def _linears(runs: Sequence[PartRun], dtype: torch.dtype) -> list[PartRun]:
    """Those of modules with parameters that are no norms; all have to be linear ones."""
    linears = [run for run in runs if not may_be_norm(run.module) and _owns_parameters(run.module)]
    if not all(is_plain_linear(run.module, dtype) for run in linears):
        raise _Unknown
    return linears


def _owns_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False))


def _norms(runs: Sequence[PartRun]) -> list[PartRun]:
    return [run for run in runs if may_be_norm(run.module)]


def _norm_part(run: PartRun) -> NormPart:
    terms = norm_terms(run.module, run.input.flatten(0, -3) if run.input.ndim > 3 else run.input)
    if terms is None:
        raise _Unknown
    size = run.input.shape[-1]
    return NormPart(path=run.path, size=size, eps=terms.eps, is_centered=terms.is_centered, plus_one=terms.plus_one)


def _attention(run: PartRun, runs: Sequence[PartRun], cache: KeyValueCache) -> AttentionPart:
    shape = cache.shapes[run.module]
    if shape.key_dim != shape.value_dim or shape.dtype != cache.dtype:
        raise _Unknown
    linears, norms = _linears(runs, cache.dtype), _norms(runs)
    if len(linears) not in (2, 4) or len(norms) not in (0, 2):
        raise _Unknown
    *projections, out = linears
    query_norm, key_norm = (_norm_part(norm) for norm in norms) if norms else (None, None)
    return AttentionPart(
        path=run.path,
        projections=tuple(projection.path for projection in projections),
        out=out.path,
        query_norm=query_norm,
        key_norm=key_norm,
        projection=Projection.SEPARATE if len(projections) == 3 else Projection.BLOCKS,
    )


def _layer(
    layer: nn.Module, hidden: Tensor, attention: PartRun, runs: Sequence[PartRun], cache: KeyValueCache
) -> LayerParts:
    inner = _inside(runs, attention)
    outer = [run for run in runs if run not in inner and run is not attention]
    experts = find_experts(outer)
    linears = _linears(outer if experts is None else [run for run in outer if not experts.holds(run)], cache.dtype)
    gates = [run for run in linears if experts is not None and is_shared_gate(run)]
    linears = [run for run in linears if run not in gates]
    if len(linears) not in ((2, 3) if experts is None else (0, 2, 3)) or len(gates) > 1:
        raise _Unknown
    first = linears[0] if experts is None else experts.experts
    made = linears[-1].output if experts is None else experts.output
    norms = _norms(outer)
    before_attention = _find(norms, output=attention.input)
    before_mlp = _find(norms, output=first.input)
    parts = {
        "before_attention": before_attention,
        "behind_attention": _find(norms, input=attention.output),
        "before_mlp": None if before_mlp is before_attention else before_mlp,
        "behind_mlp": _find(norms, input=made),
    }
    if any(norm not in parts.values() for norm in norms):
        raise _Unknown
    source = first if before_mlp is None else before_mlp  # of what the feed-forward modules read
    if before_attention is not None and not _same(before_attention.input, hidden):
        raise _Unknown
    told = {name: None if run is None else _norm_part(run) for name, run in parts.items()}
    return LayerParts(
        attention=_attention(attention, inner, cache),
        mlp=_mlp(linears) if linears else None,
        experts=None if experts is None else _experts(layer, experts, gates, cache.dtype),
        is_parallel=_same(source.input, hidden),
        shares_norm=before_mlp is not None and before_mlp is before_attention,
        before_attention=told["before_attention"],
        behind_attention=told["behind_attention"],
        before_mlp=told["before_mlp"],
        behind_mlp=told["behind_mlp"],
    )


def _experts(layer: nn.Module, runs: ExpertRuns, gates: Sequence[PartRun], dtype: torch.dtype) -> ExpertsPart:
    try:
        part = read_experts(layer, runs, gates[0].path if gates else None, dtype)
    except Exception as error:  # a router that takes or gives something else
        logger.debug("experts are not taken over: %s: %s", type(error).__name__, error)
        part = None
    if part is None:
        raise _Unknown
    return part


def _mlp(linears: Sequence[PartRun]) -> MlpPart:
    *inputs, down = linears
    is_gated = linear_shape(inputs[0].module)[0] != linear_shape(down.module)[1] or len(inputs) == 2
    return MlpPart(
        inputs=tuple(run.path for run in inputs),
        down=down.path,
        activation=Activation.SILU,
        gating=Gating.GATE_FIRST if is_gated else Gating.NONE,
    )


def _find(runs: Sequence[PartRun], **what: Tensor) -> PartRun | None:
    """The first run of which input or output is the given one."""
    ((name, value),) = what.items()
    return next((run for run in runs if _same(getattr(run, name), value)), None)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.numel() == other.numel() and torch.equal(one.reshape(-1), other.reshape(-1))
