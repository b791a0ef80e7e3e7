"""Decoder layers that follow each other, run by one compiled call where a packed pass has few tokens.

As with single modules (cpu_fusion.py), not by architecture: a layer is taken if it has the parts of the formula in
kernels/csrc/layer.h, and gave in trial passes what the formula gives (layer_trial.py). All layers of a stack but the
last hand on what they were given, and tell their rotary positions; the last one computes them all.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from loraplex.adapters.store.expert_table import ExpertTable
from loraplex.engine.kv.kv_cache import KeyValueCache
from loraplex.engine.worker import native_ops
from loraplex.engine.worker.fusion.layer_parts import ExpertsPart, LayerParts, Rotary
from loraplex.engine.worker.fusion.layer_record import ModuleIndex, layer_record
from loraplex.engine.worker.input_batch import InputBatch, current_input_batch
from loraplex.kernels.tuning import ALL_TOKENS
from loraplex.layers.own_weights.changed_output import ChangedOutput
from loraplex.residual.intervention_pass import InterventionPass, current_interventions
from loraplex.residual.sites import block_number
from loraplex.routing.plan import RoutingPlan
from loraplex.routing.routing import current_routing

# Without tiles, the compiled attention goes token by token, also through a chunk of a prompt. How many keys its tokens
# may see is measured (startup/chunk_keys.py), but for models too small for that, and while others use the machine.
USUAL_CHUNK_KEYS = 4096

RotaryTable = tuple[Tensor, Tensor]  # cosines and sines [1, tokens, dim]


class LayerStack:
    """Layers of one base model in the order in which they run, or one attention module."""

    def __init__(self, layers: Sequence[tuple[nn.Module, LayerParts]], module_index: ModuleIndex) -> None:
        self.max_chunk_keys = USUAL_CHUNK_KEYS
        self._layers = tuple(layers)
        self._module_index = module_index
        self._hooks = [
            hooks
            for layer, _ in layers
            for module in layer.modules()
            for hooks in (module._forward_hooks, module._forward_pre_hooks)
        ]
        self._needs_rotary = [parts.attention.rotary is not Rotary.NONE for _, parts in layers]
        linears = [layer.get_submodule(path) for layer, parts in layers for path in parts.linears if path is not None]
        limits = [getattr(module, "lora_max_compiled", ALL_TOKENS) for module in linears]
        self._max_compiled = min(limits + [max_expert_tokens(layer, parts.experts) for layer, parts in layers])
        self._expert_indices = [index for layer, parts in layers for index in _indices(layer, parts, module_index)]
        self._attentions = [layer.get_submodule(parts.attention.path) for layer, parts in layers]
        self._is_attention = len(layers) == 1 and layers[0][1].is_attention_only
        self._numbers: tuple[int, ...] = (-1,)
        self._records: WeakKeyDictionary[KeyValueCache, tuple[Tensor, Tensor, list[Tensor]]] = WeakKeyDictionary()

    def __len__(self) -> int:
        return len(self._layers)

    def begin(self, batch: InputBatch, hidden: Tensor) -> "StackedPass | None":
        """A pass through the layers for hidden [1, tokens, hidden]; None if they have to run one by one this time."""
        plan = self._plan(batch, hidden)
        apart, ends = self._interrupted(batch)
        interventions = current_interventions()
        blocks = self._blocks() if isinstance(interventions, InterventionPass) and not self._is_attention else ()
        if isinstance(interventions, InterventionPass):
            interventions.done.difference_update(blocks)
        if plan is None or len(apart) == len(self) or -1 in blocks:
            return None
        vectors: Sequence[Tensor] = ()
        if isinstance(interventions, InterventionPass) and blocks:
            interventions.done.update(block for place, block in enumerate(blocks) if place not in apart)
            vectors = interventions.addresses(blocks, batch.num_tokens)
        asked = () if batch.attention is None else batch.attention.compiled(self._attentions, apart)
        return StackedPass(self, batch, plan, vectors, asked, apart, ends)

    def _interrupted(self, batch: InputBatch) -> tuple[frozenset[int], frozenset[int]]:
        """The layers by place that run module by module in a pass, and those behind which something is done."""
        apart: set[int] = set()
        ends: set[int] = set()
        if batch.attention is not None:
            apart.update(place for place, module in enumerate(self._attentions) if batch.attention.interrupts(module))
        interventions = current_interventions()
        if isinstance(interventions, InterventionPass):
            if self._is_attention:  # what is done to its output is done behind it
                apart.update((0,) if interventions.has_gates else ())
            else:
                blocks = self._blocks()
                apart.update(place for place, block in enumerate(blocks) if interventions.acts_inside(block))
                ends.update(place for place, block in enumerate(blocks) if interventions.acts_behind(block))
        ends.update(place - 1 for place in apart)
        return frozenset(apart), frozenset(ends)

    def _blocks(self) -> tuple[int, ...]:
        """The layers' numbers among the base model's blocks; -1 where one is none."""
        if -1 in self._numbers:
            numbers = (block_number(layer) for layer, _ in self._layers)
            self._numbers = tuple(-1 if number is None else number for number in numbers)
        return self._numbers

    def _plan(self, batch: InputBatch, hidden: Tensor) -> RoutingPlan | None:
        """The routing plan of a pass that the compiled call can run."""
        if batch.layer_by_layer or not batch.is_native:
            return None
        if batch.num_chunk_keys > self.max_chunk_keys and not native_ops.attends_prompts(
            hidden.dtype, batch.cache.dtype
        ):
            return None
        routing = current_routing()
        if batch.stand_in is not None or routing is None:
            return None
        if any(map(_is_foreign, self._hooks)):
            return None
        plan = routing.plan_for(1, batch.num_tokens)
        if plan.has_changes and any(_changes_output(hook, plan) for hooks in self._hooks for hook in hooks.values()):
            return None
        return plan if plan.decodes_fast(hidden, self._max_compiled) and not plan.has_dora_scales else None

    def run(
        self,
        batch: InputBatch,
        plan: RoutingPlan,
        hidden: Tensor,
        rotary: Sequence[RotaryTable | None],
        vectors: Sequence[Tensor] = (),
        asked: Sequence[Tensor] = (),
        places: range | None = None,
    ) -> Tensor:  # [1, tokens, hidden]
        """What the layers at some places (None: all) make of hidden; `rotary` are the positions that each was given,
        `vectors` are added, and `asked` is done beside attention."""
        if batch.cache not in self._records:
            self._records[batch.cache] = self._record(batch.cache, plan.bank.expert_table())
        layers, constants, _ = self._records[batch.cache]
        some = slice(0, len(self)) if places is None else slice(places.start, places.stop)
        sizes = (batch.cache.num_blocks, batch.cache.block_tokens)
        tables: dict[int, int] = {}  # by the cosines' identity
        values: list[Tensor] = []
        kinds = []
        for table, needs_one in zip(rotary[some], self._needs_rotary[some], strict=True):
            if not needs_one or table is None:
                kinds.append(-1)
                continue
            kind = tables.setdefault(id(table[0]), len(tables))
            if 2 * kind == len(values):
                values += [part[0].float().contiguous() for part in table]
            kinds.append(kind)
        own, own_asked = ([table[0][:, some].contiguous(), table[1]] if table else [] for table in (vectors, asked))
        where = (batch.table.values, batch.rows, batch.positions)
        adapters = (*plan.table, plan.rows, plan.gates.all())
        experts = plan.bank.expert_table() if any(map(plan.adapts, self._expert_indices)) else None
        made = native_ops.decode_layers(
            hidden[0],
            layers[some],
            constants[some],
            sizes,
            values,
            kinds,
            *where,
            *adapters,
            plan.routing,
            own,
            own_asked,
            *((), 0) if experts is None else (experts.all(), experts.width),
        )
        return made.unsqueeze(0)

    def as_output(self, made: Tensor, place: int) -> Any:
        """States as the layer at this place returns them."""
        num_outputs = self._layers[place][1].num_outputs
        return (made, *[None] * (num_outputs - 1)) if num_outputs else made

    def _record(self, cache: KeyValueCache, table: ExpertTable | None) -> tuple[Tensor, Tensor, list[Tensor]]:
        """What the compiled call reads about the layers, and tensors that it reads from there."""
        records = [layer_record(layer, parts, cache, self._module_index, table) for layer, parts in self._layers]
        addresses = torch.tensor([ints for ints, _, _ in records])
        constants = torch.tensor([floats for _, floats, _ in records], dtype=torch.float64)
        return addresses, constants, [tensor for _, _, kept in records for tensor in kept]


def max_expert_tokens(layer: nn.Module, part: ExpertsPart | None) -> int:
    """How many tokens a pass may have, so that its experts get no more each, on average, than the compiled product is
    the fastest for."""
    if part is None:
        return ALL_TOKENS
    limit: int = getattr(layer.get_submodule(part.path), "lora_max_compiled", ALL_TOKENS)
    return limit * part.router.num_experts // part.router.top_k


def _indices(layer: nn.Module, parts: LayerParts, module_index: ModuleIndex) -> list[int]:
    """The numbers of a layer's stacked experts in routing plans."""
    if parts.experts is None:
        return []
    module = layer.get_submodule(parts.experts.path)
    keys = ((module, name) for name in (parts.experts.input, parts.experts.down))
    return [module_index[key] for key in keys if key in module_index]


class StackedPass:
    """A packed pass on its way through a stack."""

    def __init__(
        self,
        stack: LayerStack,
        batch: InputBatch,
        plan: RoutingPlan,
        vectors: Sequence[Tensor] = (),
        asked: Sequence[Tensor] = (),
        apart: frozenset[int] = frozenset(),  # places of layers that run module by module
        ends: frozenset[int] = frozenset(),  # those behind which something is done
    ) -> None:
        self.stack = stack
        self._batch, self._plan, self._vectors, self._asked = batch, plan, vectors, asked
        self._apart, self._ends = apart, ends
        self._rotary: list[RotaryTable | None] = []
        self._first = 0  # place of the first layer that isn't computed yet

    @property
    def is_apart(self) -> bool:
        """Whether the next layer runs module by module; all before it are computed then."""
        return len(self._rotary) in self._apart

    def pass_over(self) -> None:
        """The next layer has run by itself."""
        self._rotary.append(None)
        self._first = len(self._rotary)

    def go_on(self, hidden: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        """The next layer's turn, which was called with these arguments: its input, or what all so far make of it."""
        self._rotary.append(rotary_table(args, kwargs))
        place = len(self._rotary) - 1
        if place + 1 < len(self.stack) and place not in self._ends:
            return hidden
        places = range(self._first, place + 1)
        self._first = place + 1
        return self.stack.run(self._batch, self._plan, hidden, self._rotary, self._vectors, self._asked, places)


def rotary_table(args: Sequence[Any], kwargs: Mapping[str, Any]) -> RotaryTable | None:
    """The cosines and sines among the arguments of a layer or of its attention."""
    named = kwargs.get("position_embeddings")
    for value in (named, *args, *kwargs.values()):
        if isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(part, Tensor) for part in value):
            cos, sin = value
            if cos.shape == sin.shape and cos.ndim == 3 and cos.is_floating_point():
                return cos, sin
    return None


def chains(layers: Sequence[nn.Module], seen: Sequence[Sequence[tuple[nn.Module, Any, Any]]]) -> list[list[nn.Module]]:
    """`layers` in runs that feed each other; `seen` has (layer, input, output) of each pass.

    In a pass the layers that are not among `layers` are not seen, so a layer behind one of those begins a run.
    """
    orders = [[layer for layer, _, _ in one] for one in seen]
    if not orders or any(order != orders[0] for order in orders) or len(set(orders[0])) != len(orders[0]):
        return []
    runs: list[list[nn.Module]] = []
    for i, layer in enumerate(orders[0]):
        follows = i > 0 and all(one[i][1] is one[i - 1][2] for one in seen)
        if layer not in layers:
            runs.append([])
        elif follows and runs:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return [run for run in runs if run]


def _is_foreign(hooks: Mapping[int, Any]) -> bool:
    """Whether somebody else's hook wants to see a module run; ours act in passes that don't come here."""
    return bool(hooks) and any(
        not str(getattr(hook, "__module__", "")).startswith("loraplex.") for hook in hooks.values()
    )


def _changes_output(hook: Any, plan: RoutingPlan) -> bool:
    """Whether a hook puts other weights in the place of a module's for some of the plan's rows."""
    return isinstance(hook, ChangedOutput) and plan.changes(hook.path)


def layer_forward(former: type[nn.Module], attribute: str) -> Callable[..., Any]:
    """The forward of a layer whose `attribute` tells its stack and its place there."""

    def run(self: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        batch = current_input_batch()
        if batch is None:
            return former.forward(self, hidden_states, *args, **kwargs)
        stack, place = vars(self)[attribute]
        if place == 0:
            batch.stacked = stack.begin(batch, hidden_states)
        stacked = batch.stacked
        if stacked is None or stacked.stack is not stack:
            return former.forward(self, hidden_states, *args, **kwargs)
        if stacked.is_apart:
            output = former.forward(self, hidden_states, *args, **kwargs)
            stacked.pass_over()
            return output
        made = stacked.go_on(hidden_states, args, kwargs)
        return stack.as_output(made, place)

    return run


def attention_forward(former: type[nn.Module], attribute: str) -> Callable[..., Any]:
    """The forward of an attention module that is computed in one call; `attribute` is as in `layer_forward`."""

    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        batch = current_input_batch()
        hidden = args[0] if args else kwargs.get("hidden_states")
        if batch is None or not isinstance(hidden, Tensor):
            return former.forward(self, *args, **kwargs)
        stack, place = vars(self)[attribute]
        stacked = stack.begin(batch, hidden)
        if stacked is None:
            return former.forward(self, *args, **kwargs)
        made = stacked.go_on(hidden, args, kwargs)
        return stack.as_output(made, place)

    return run
