"""Which decoder layers, and which attention modules by themselves, give what the compiled formula gives."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from loraplex.engine.kv.kv_cache import KeyValueCache
from loraplex.engine.worker.fusion.expert_parts import expert_candidates, near_ties
from loraplex.engine.worker.fusion.layer_parts import (
    ExpertsPart,
    Gating,
    LayerParts,
    MlpPart,
    Projection,
    Rotary,
    numbers_of,
    tensor_at,
)
from loraplex.engine.worker.fusion.layer_record import ModuleIndex
from loraplex.engine.worker.fusion.layer_stack import LayerStack
from loraplex.engine.worker.fusion.layer_watch import LayerWatch, read_attention, read_layer
from loraplex.engine.worker.fusion.part_run import PartRun
from loraplex.engine.worker.input_batch import InputBatch, current_input_batch
from loraplex.layers.fusion.activations import Activation, activations_in
from loraplex.layers.fusion.agreement import SCALES, TOLERANCE, distance, holds

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class LayerFindings:
    """What the trial passes told about layers and attention modules."""

    layers: dict[nn.Module, LayerParts | None] = field(default_factory=dict)  # None: another formula
    attentions: dict[nn.Module, LayerParts | None] = field(default_factory=dict)


class LayerTrial:
    """Compares layers with the formula in each pass of single tokens."""

    def __init__(self, cache: KeyValueCache, module_index: ModuleIndex) -> None:
        self._cache = cache
        self._module_index = module_index
        self._watch: LayerWatch | None = None
        self.findings = LayerFindings()

    def run(self, layers: Sequence[nn.Module], passes: Callable[[], object]) -> LayerFindings:
        """`layers` each hold one attention module."""
        watch = self._watch = LayerWatch(layers, _is_of_single_tokens)

        def compare(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            runs = watch.take()
            if _is_of_single_tokens():
                self._compare(layer, runs, (args, kwargs), output)
                watch.take()

        try:
            with hooked(layers, compare):
                passes()
        finally:
            watch.remove()
            self._watch = None
        return self.findings

    def _compare(self, layer: nn.Module, runs: Sequence[PartRun], call: Call, output: Any) -> None:
        attention = next((run for run in runs if run.module in self._cache.shapes), None)
        found = self.findings
        alone = None if attention is None else self._attention(attention, runs)
        if layer not in found.layers:
            parts = None if alone is None or not call[0] else read_layer(layer, call[0][0], runs, self._cache)
            if parts is not None and alone is not None:
                chosen = replace(alone.attention, **_paths(parts))
                candidates = layer_candidates(layer, replace(parts, attention=chosen))
                parts = self._choose(layer, candidates, call, output, runs)
            found.layers[layer] = parts
        own = found.layers[layer]
        if own is not None and not self._agrees(layer, own, call):
            found.layers[layer] = None
        layer.forward(*call[0], **call[1])  # whose keys and values stay

    def _attention(self, run: PartRun, runs: Sequence[PartRun]) -> LayerParts | None:
        """The parts of an attention module, as long as they agree."""
        found, call = self.findings.attentions, (run.args, run.kwargs)
        if run.module not in found:
            own = [replace(inner, path=inner.path.removeprefix(f"{run.path}.")) for inner in runs if _is_in(inner, run)]
            part = read_attention(replace(run, path=""), own, self._cache)
            candidates = [] if part is None else attention_candidates(run.module, LayerParts(attention=part))
            found[run.module] = self._choose(run.module, candidates, call, run.returned, own)
        parts = found[run.module]
        if parts is not None and not self._agrees(run.module, parts, call):
            found[run.module] = parts = None
        return parts

    def _choose(
        self, module: nn.Module, candidates: Iterable[LayerParts], call: Call, output: Any, runs: Sequence[PartRun]
    ) -> LayerParts | None:
        """Those parts that come nearest to what the module gave, if they agree; `runs` are its own parts'."""
        best: tuple[float, LayerParts | None] = (torch.inf, None)
        for parts in candidates:
            error = [torch.inf]
            holds(partial(self._measure, error, module, parts, call, output, runs))
            if error[0] < best[0] and error[0] <= TOLERANCE[self._cache.dtype]:
                best = (error[0], parts)
        num_outputs = len(output) if isinstance(output, tuple) else 0
        return None if best[1] is None else replace(best[1], num_outputs=num_outputs)

    def _measure(
        self,
        error: list[float],
        module: nn.Module,
        parts: LayerParts,
        call: Call,
        output: Any,
        runs: Sequence[PartRun],
    ) -> bool:
        error[0] = self._distance(module, parts, runs, self._made(module, parts, call), states_of(output))
        return True

    def _agrees(self, module: nn.Module, parts: LayerParts, call: Call) -> bool:
        return holds(partial(self._agrees_at_all_scales, module, parts, call))

    def _agrees_at_all_scales(self, module: nn.Module, parts: LayerParts, call: Call) -> bool:
        assert self._watch is not None, "modules are compared while they are watched"
        for scale in SCALES:
            scaled = _scaled(call, scale)
            self._watch.take()
            theirs = states_of(module.forward(*scaled[0], **scaled[1]))
            runs = self._watch.take()
            made = self._made(module, parts, scaled)
            if not self._distance(module, parts, runs, made, theirs) <= TOLERANCE[self._cache.dtype]:
                return False
        return True

    def _distance(
        self, module: nn.Module, parts: LayerParts, runs: Sequence[PartRun], ours: Tensor | None, theirs: Any
    ) -> float:
        """How far the formula is from the module, but for tokens that rounding may send to other experts."""
        if parts.experts is None or ours is None or not isinstance(theirs, Tensor):
            return distance(ours, theirs)
        router = parts.experts.router
        logits = next(run.output for run in runs if run.path == router.path)
        correction = None if router.correction is None else tensor_at(module, router.correction).float().flatten()
        clear = ~near_ties(logits, router, correction, self._cache.dtype)
        return distance(ours[:, clear], theirs[:, clear]) if clear.any() else torch.inf

    def _made(self, module: nn.Module, parts: LayerParts, call: Call) -> Tensor | None:
        """What the formula gives."""
        batch = current_input_batch()
        assert batch is not None, "the trial runs packed passes"
        stack = LayerStack([(module, parts)], self._module_index)
        hidden = hidden_of(call)
        stacked = stack.begin(batch, hidden)
        return None if stacked is None else stacked.go_on(hidden, *call)


def attention_candidates(attention: nn.Module, parts: LayerParts) -> list[LayerParts]:
    """The ways in which modules give heads, those of rotary positions, and numbers that may scale queries."""
    own = parts.attention
    is_joined = own.projection is not Projection.SEPARATE
    projections = (Projection.BLOCKS, Projection.GROUPS) if is_joined else (Projection.SEPARATE,)
    return [
        replace(parts, attention=replace(own, projection=projection, rotary=rotary, scale_factor=factor))
        for projection in projections
        for rotary in Rotary
        for factor in numbers_of(attention)
    ]


def layer_candidates(layer: nn.Module, parts: LayerParts) -> Iterator[LayerParts]:
    """The activations, orders of a gate, and numbers that a layer may have."""
    for activation in activations_in(layer):
        for mlp in _mlp_candidates(parts.mlp, activation):
            for experts in _expert_candidates(layer, parts, activation):
                for multiplier in numbers_of(layer):
                    yield replace(parts, mlp=mlp, experts=experts, multiplier=multiplier)


def _mlp_candidates(mlp: MlpPart | None, activation: Activation) -> Iterator[MlpPart | None]:
    if mlp is None:
        yield None
        return
    for own in (mlp, replace(mlp, inputs=mlp.inputs[::-1], gating=_swapped(mlp.gating, len(mlp.inputs)))):
        yield replace(own, activation=activation)


def _expert_candidates(layer: nn.Module, parts: LayerParts, activation: Activation) -> Iterator[ExpertsPart | None]:
    if parts.experts is None:
        yield None
        return
    for own in expert_candidates(layer, parts.experts):
        yield replace(own, activation=activation)


def _swapped(gating: Gating, num_inputs: int) -> Gating:
    return Gating.UP_FIRST if gating is Gating.GATE_FIRST and num_inputs == 1 else gating


def _paths(parts: LayerParts) -> dict[str, Any]:
    """An attention's modules as seen from its layer."""
    own = parts.attention
    names = ("path", "projections", "out", "query_norm", "key_norm")
    return {name: getattr(own, name) for name in names}


def _is_in(inner: PartRun, outer: PartRun) -> bool:
    return inner.path.startswith(f"{outer.path}.")


def _is_of_single_tokens() -> bool:
    batch = current_input_batch()
    return isinstance(batch, InputBatch) and batch.num_single == batch.num_tokens


def hidden_of(call: Call) -> Tensor:
    """The states that a module was called with."""
    hidden = call[0][0] if call[0] else call[1]["hidden_states"]
    assert isinstance(hidden, Tensor), "a module was called with something else than states"
    return hidden


def _scaled(call: Call, scale: float) -> Call:
    args, kwargs = call
    if args:
        return (args[0] * scale, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": hidden_of(call) * scale}


def states_of(output: Any) -> Any:
    """The states among a module's outputs, if there are no others."""
    if isinstance(output, tuple):
        return output[0] if all(other is None for other in output[1:]) else None
    return output


@contextmanager
def hooked(modules: Sequence[nn.Module], hook: Callable[..., None]) -> Iterator[None]:
    """Let a forward hook with keyword arguments see modules run inside the block."""
    handles = [module.register_forward_hook(hook, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
