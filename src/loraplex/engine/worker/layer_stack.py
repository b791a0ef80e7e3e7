"""Decoder layers that follow each other, run by one compiled call where a packed pass has few tokens.

As with single modules (cpu_fusion.py), not by architecture: a layer is taken if it has the parts of the formula in
kernels/csrc/decoder.h, whose modules were all taken over by themselves, and gave in trial passes what the formula
gives. The first layer of a stack computes all of them, and the others hand its result on.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from loraplex.engine.kv.kv_cache import KeyValueCache
from loraplex.engine.worker import native_ops
from loraplex.engine.worker.input_batch import InputBatch, current_input_batch
from loraplex.kernels.int8_weight import Int8Weight
from loraplex.kernels.packed_weight import PackedWeight
from loraplex.kernels.tuning import ALL_TOKENS
from loraplex.routing.plan import RoutingPlan
from loraplex.routing.routing import current_routing

_LINEAR = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
_NORMS = ("input_layernorm", "post_attention_layernorm")
# The compiled attention goes token by token, also through a chunk of a prompt: some 3 microseconds for each key in all
# layers of SmolLM2, so that beyond this it costs more than the calls from Python for each module, 10 ms in all.
_CHUNK_KEYS = 4096
_LANES = 16  # values of a vector in the compiled kernel

NormTerms = Callable[[nn.Module], tuple[float, bool]]  # epsilon, and whether it multiplies by 1 + weight


class LayerStack:
    """Layers of one base model, in the order in which they run."""

    def __init__(
        self, layers: Sequence[nn.Module], module_index: Mapping[nn.Module, int], norm_terms: NormTerms
    ) -> None:
        """`module_index` are the numbers of the linear modules in routing plans."""
        self._layers = tuple(layers)
        self._module_index = module_index
        self._norm_terms = norm_terms
        self._attention = layers[0].get_submodule("self_attn")
        self._hooks = [
            hooks
            for layer in layers
            for module in layer.modules()
            if module is not layer
            for hooks in (module._forward_hooks, module._forward_pre_hooks)
        ]
        linear = [_linear(layer, path) for layer in layers for path in _LINEAR]
        held = {type(module.weight) if isinstance(module.weight, PackedWeight) else Tensor for module in linear}
        self._is_packed = held == {PackedWeight}
        groups = [module.weight.group for module in linear if isinstance(module.weight, Int8Weight)]
        self._int8_groups = torch.tensor(groups) if held == {Int8Weight} else None
        self._max_compiled = min(getattr(module, "lora_max_compiled", ALL_TOKENS) for module in linear)
        if len(held) > 1:
            self._max_compiled = 0
        self._described: WeakKeyDictionary[KeyValueCache, tuple[Tensor, Tensor, list[int]]] = WeakKeyDictionary()

    def run(self, batch: InputBatch, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor | None:
        """What the layers make of hidden [1, tokens, hidden]; None if they have to run one by one this time."""
        plan = self._plan(batch, hidden)
        if plan is None:
            return None
        if batch.cache not in self._described:
            self._described[batch.cache] = self._describe(batch.cache)
        adapters = (*plan.table, plan.rows, plan.gates.all())
        cos, sin = position_embeddings
        places = (batch.table.values, batch.rows, batch.positions)
        described = self._described[batch.cache]
        return native_ops.decode_layers(
            hidden[0], *described, cos[0], sin[0], *places, *adapters, self._is_packed, self._int8_groups
        ).unsqueeze(0)

    def _plan(self, batch: InputBatch, hidden: Tensor) -> RoutingPlan | None:
        """The routing plan of a pass that the compiled call can run."""
        if batch.layer_by_layer or not batch.is_native or batch.num_chunk_keys > _CHUNK_KEYS:
            return None
        routing = current_routing()
        if batch.attention is not None or routing is None or any(map(_is_foreign, self._hooks)):
            return None
        plan = routing.plan_for(1, batch.num_tokens)
        return plan if plan.decodes_fast(hidden, self._max_compiled) and not plan.has_dora_scales else None

    def _describe(self, cache: KeyValueCache) -> tuple[Tensor, Tensor, list[int]]:
        """What the compiled call reads about the layers: addresses, constants and sizes."""
        addresses, constants = [], []
        for layer in self._layers:
            attention = layer.get_submodule("self_attn")
            linear = [_linear(layer, path) for path in _LINEAR]
            norms = [layer.get_submodule(path) for path in _NORMS]
            keys, values = cache.layers[attention]
            terms = cache.shapes[attention].terms
            addresses.append(
                [_address(norm.weight) for norm in norms]
                + [_address(module.weight) for module in linear]
                + [_address(module.bias) for module in linear]
                + [self._module_index[module] for module in linear]
                + [_address(keys), _address(values), terms.mask_rule.window or 0]
            )
            norm_terms = [float(term) for norm in norms for term in self._norm_terms(norm)]
            constants.append([*norm_terms, terms.scale, terms.softcap or 0.0])
        head_dim, num_heads = _heads(self._attention)
        num_kv_heads = cache.shapes[self._attention].num_kv_heads
        inner = _linear(self._layers[0], "mlp.gate_proj").out_features
        sizes = [num_heads, num_kv_heads, head_dim, inner, cache.num_blocks, cache.block_tokens]
        return torch.tensor(addresses), torch.tensor(constants, dtype=torch.float64), sizes


def may_be_stacked(layer: nn.Module, cache: KeyValueCache, taken: Callable[[nn.Module], bool]) -> bool:
    """Whether a layer has the formula's parts and no others, of sizes that the compiled call takes."""
    if {name for name, _ in layer.named_children()} != {"self_attn", "mlp", *_NORMS}:
        return False
    attention = layer.get_submodule("self_attn")
    parts = [attention, layer.get_submodule("mlp"), *(layer.get_submodule(path) for path in _NORMS)]
    if not all(taken(part) for part in parts) or attention not in cache.shapes:
        return False
    if not all(_is_plain(layer.get_submodule(path), cache.dtype) for path in _LINEAR):
        return False
    shape, head_dim = cache.shapes[attention], _heads(attention)[0]
    if shape.terms.sinks is not None or shape.terms.mask_rule.chunk is not None:
        return False
    fits = shape.key_dim == shape.value_dim == head_dim and shape.dtype == cache.dtype
    return fits and _linear(layer, "mlp.gate_proj").out_features % _LANES == 0


def chains(layers: Sequence[nn.Module], seen: Sequence[Sequence[tuple[nn.Module, Any, Any]]]) -> list[list[nn.Module]]:
    """`layers` in runs of equal sizes that feed each other; `seen` has (layer, input, output) of each pass.

    In a pass the layers that are not among `layers` are not seen, so a layer behind one of those begins a run.
    """
    orders = [[layer for layer, _, _ in one] for one in seen]
    if not orders or any(order != orders[0] for order in orders) or len(set(orders[0])) != len(orders[0]):
        return []
    runs: list[list[nn.Module]] = []
    for i, layer in enumerate(orders[0]):
        follows = i > 0 and all(one[i][1] is one[i - 1][2] for one in seen)
        follows = follows and sizes_of(layer) == sizes_of(orders[0][i - 1])
        if layer not in layers:
            runs.append([])
        elif follows and runs:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return [run for run in runs if run]


def sizes_of(layer: nn.Module) -> list[torch.Size]:
    """What must be equal in all layers of a stack, which the compiled call is told once."""
    return [parameter.shape for parameter in layer.parameters()]


def _linear(layer: nn.Module, path: str) -> nn.Linear:
    module = layer.get_submodule(path)
    assert isinstance(module, nn.Linear), f"{path} was looked for in a layer that may not be stacked"
    return module


def _heads(attention: nn.Module) -> tuple[int, int]:
    """The dimension of a head, and the number of heads."""
    head_dim = attention.head_dim
    assert isinstance(head_dim, int), "an attention without head_dim was taken over"
    return head_dim, _linear(attention, "q_proj").out_features // head_dim


def _address(tensor: object) -> int:
    """Where a weight lies; 0 is none."""
    return tensor.data_ptr() if isinstance(tensor, Tensor) else 0


def _is_plain(module: nn.Module, dtype: torch.dtype) -> bool:
    if not isinstance(module, nn.Linear) or "forward" in vars(module):
        return False
    return module.weight.is_contiguous() and module.weight.dtype == dtype


def _is_foreign(hooks: Mapping[int, Any]) -> bool:
    """Whether somebody else's hook wants to see a module run; ours act in passes that don't come here."""
    return bool(hooks) and any(
        not str(getattr(hook, "__module__", "")).startswith("loraplex.") for hook in hooks.values()
    )


def layer_forward(former: type[nn.Module], attribute: str) -> Callable[..., Any]:
    """The forward of a layer whose `attribute` tells its stack and its place there."""

    def run(self: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        batch = current_input_batch()
        if batch is None:
            return former.forward(self, hidden_states, *args, **kwargs)
        stack, place = vars(self)[attribute]
        if place == 0:
            positions = kwargs.get("position_embeddings")
            made = None if positions is None else stack.run(batch, hidden_states, positions)
            batch.stack_done = None if made is None else stack
            if made is not None:
                return made
        elif batch.stack_done is stack:
            return hidden_states
        return former.forward(self, hidden_states, *args, **kwargs)

    return run
