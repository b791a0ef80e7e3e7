"""Modules between the linear ones, run by one compiled operator each where a packed batch is decoded.

Not by architecture: a module is taken over if it has the parts that a formula needs and one of its kind gives what the
formula gives (layers/fusion), also for large inputs and at far positions. Outside of packed passes it runs as it did.
"""

import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformers import PreTrainedModel

from loraplex.engine.kv.kv_cache import KeyValueCache
from loraplex.engine.worker import native_ops
from loraplex.engine.worker.attention import packed_attention
from loraplex.engine.worker.fusion.attention_agreement import attentions_agree
from loraplex.engine.worker.fusion.layer_parts import LayerParts
from loraplex.engine.worker.fusion.layer_record import ModuleIndex
from loraplex.engine.worker.fusion.layer_stack import LayerStack, attention_forward, chains, layer_forward
from loraplex.engine.worker.fusion.layer_trial import LayerTrial, hooked, states_of
from loraplex.engine.worker.fusion.linear_products import LinearProducts
from loraplex.engine.worker.input_batch import current_input_batch
from loraplex.kernels import native_parts
from loraplex.layers.base.module_kinds import module_kind
from loraplex.layers.fusion.activations import Activation, activation_of, may_be_gated_mlp, run_gated_mlp
from loraplex.layers.fusion.agreement import holds
from loraplex.layers.fusion.norms import NormTerms, may_be_rms_norm, rms_terms

_NORM_TERMS = "loraplex_norm_terms"  # on a norm: how it is computed
_ACTIVATION = "loraplex_activation"  # on a feed-forward module: the kind of its activation
_STACK = "loraplex_stack"  # on a decoder layer, or an attention module: its stack, and its place there


_Found = TypeVar("_Found", bool, LayerParts)


class Trial(NamedTuple):
    """Packed passes to compare modules in."""

    run: Callable[[], object]  # through a layer of each kind: long, short and at far positions
    run_all: Callable[[], object]  # a few tokens through all layers


class CpuFusion:
    """The modules of one base model that were taken over; those of a kind by what one of them computes."""

    def __init__(
        self,
        base: PreTrainedModel,
        cache: KeyValueCache,
        module_index: ModuleIndex,
        trial: Trial,
    ) -> None:
        """`module_index` as in routing plans; `cache` has the modules that packed passes know."""
        self._taken: list[tuple[nn.Module, type[nn.Module]]] = []
        self._products = LinearProducts(base)
        self._stacks: list[LayerStack] = []
        self.num_users = 0
        try:
            self._take_modules(base, cache, trial)
            self._stack_layers(base, cache, module_index, trial)
        except BaseException:
            self._restore()
            raise

    def release(self) -> None:
        """One user less; the last one gives the modules back."""
        self.num_users -= 1
        if self.num_users == 0:
            self._restore()

    def _take_modules(self, base: PreTrainedModel, cache: KeyValueCache, trial: Trial) -> None:
        modules = [module for module in base.modules() if "forward" not in vars(module)]  # offloading puts one there
        attention = [module for module in modules if module in cache.shapes and _is_rotary_attention(module)]
        for module in _attention_that_agrees(attention, trial):
            self._take(module, _attention_forward)
        norms: dict[Hashable, NormTerms | None] = {}  # by kind; None: no formula gives what it gives
        mlps: dict[Hashable, Activation | None] = {}
        for module in modules:
            if may_be_rms_norm(module):
                kind = module_kind(module)
                if kind not in norms:
                    norms[kind] = rms_terms(module)
                if norms[kind] is not None:
                    vars(module)[_NORM_TERMS] = norms[kind]
                    self._take(module, _norm_forward)
            elif may_be_gated_mlp(module):
                kind = module_kind(module)
                if kind not in mlps:
                    mlps[kind] = activation_of(module)
                if mlps[kind] is not None:
                    vars(module)[_ACTIVATION] = mlps[kind]
                    self._take(module, _mlp_forward)

    def _stack_layers(
        self, base: PreTrainedModel, cache: KeyValueCache, module_index: ModuleIndex, trial: Trial
    ) -> None:
        """Let decoder layers run together where single tokens are decoded, and else their attention in one call."""
        layers = _layers_with_attention(base, cache)
        attentions = {layer: next(module for module in layer.modules() if module in cache.shapes) for layer in layers}
        found = LayerTrial(cache, module_index).run(layers, trial.run)
        parts = _of_all_kinds(layers, found.layers)
        for run in chains(list(parts), _seen(list(parts), trial)):
            stack = self._stacked([(layer, parts[layer]) for layer in run], module_index)
            for place, layer in enumerate(run):
                attentions.pop(layer)
                vars(layer)[_STACK] = (stack, place)
                self._take_as(layer, _class_with(type(layer), layer_forward))
        for attention, own in _of_all_kinds(list(attentions.values()), found.attentions).items():
            stack = self._stacked([(attention, own)], module_index)
            vars(attention)[_STACK] = (stack, 0)
            self._take_as(attention, _class_with(type(attention), attention_forward))

    def _stacked(self, layers: Sequence[tuple[nn.Module, LayerParts]], module_index: ModuleIndex) -> LayerStack:
        self._stacks.append(LayerStack(layers, module_index))
        return self._stacks[-1]

    def limit_chunk_keys(self, limit: int) -> None:
        """Up to how many keys the tokens of a pass's prompts may see where layers run together without tiles."""
        for stack in self._stacks:
            stack.max_chunk_keys = limit

    def _restore(self) -> None:
        for module, former in reversed(self._taken):
            module.__class__ = former
            for name in (_NORM_TERMS, _ACTIVATION, _STACK):
                vars(module).pop(name, None)
        self._taken = []
        self._products.release()

    def _take(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        self._take_as(module, _subclass(type(module), forward))

    def _take_as(self, module: nn.Module, subclass: type[nn.Module]) -> None:
        self._taken.append((module, type(module)))
        module.__class__ = subclass


def stack_of(module: nn.Module) -> LayerStack | None:
    """What computes a decoder layer together with others, or an attention module; None: it runs as it is."""
    found: tuple[LayerStack, int] | None = vars(module).get(_STACK)
    return None if found is None else found[0]


_fusions: "WeakKeyDictionary[PreTrainedModel, CpuFusion]" = WeakKeyDictionary()
_lock = threading.Lock()


def fuse(base: PreTrainedModel, cache: KeyValueCache, module_index: ModuleIndex, trial: Trial) -> CpuFusion:
    """The base model's fusion, which all its engines share; each ends its use with `release`."""
    with _lock:
        known = _fusions.get(base)
        if known is None or known.num_users == 0:
            known = _fusions[base] = CpuFusion(base, cache, module_index, trial)
        known.num_users += 1
    return known


_subclasses: dict[tuple[type[nn.Module], Callable[..., Any]], type[nn.Module]] = {}


def _subclass(former: type[nn.Module], forward: Callable[..., Any]) -> type[nn.Module]:
    """A class that runs `forward` in native packed passes and `former`'s otherwise."""
    known = _subclasses.get((former, forward))
    if known is not None:
        return known

    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        batch = current_input_batch()
        if batch is None or not batch.is_native:
            return former.forward(self, *args, **kwargs)
        return forward(self, *args, **kwargs)

    _subclasses[former, forward] = _with_forward(former, run)
    return _subclasses[former, forward]


def _with_forward(former: type[nn.Module], forward: Callable[..., Any]) -> type[nn.Module]:
    forward.__wrapped__ = former.forward  # type: ignore[attr-defined]  # for whoever asks for its signature
    # The module's own namespace: transformers looks there for functions that belong to a class.
    return type(former.__name__, (former,), {"forward": forward, "__module__": former.__module__})


# Root mean square norms


def _norm_forward(module: nn.Module, x: Tensor) -> Tensor:
    terms: NormTerms = vars(module)[_NORM_TERMS]
    return native_parts.rms_norm(x.contiguous(), module.weight, terms.eps, terms.plus_one)  # type: ignore[arg-type]


# Gated feed-forward modules


def _mlp_forward(module: nn.Module, x: Tensor) -> Any:
    return run_gated_mlp(module, x, vars(module)[_ACTIVATION])


# Attention with rotary positions


def _is_rotary_attention(module: nn.Module) -> bool:
    """Whether it has the parts and no others."""
    names = {name for name, _ in module.named_children()} - {"q_norm", "k_norm"}
    return names == {"q_proj", "k_proj", "v_proj", "o_proj"} and isinstance(getattr(module, "head_dim", None), int)


def _of_all_kinds(modules: Sequence[nn.Module], found: Mapping[nn.Module, _Found | None]) -> dict[nn.Module, _Found]:
    """For all modules of a kind what was found for some; without kinds of which some were found to be nothing."""
    kinds = {module: module_kind(module, _index_of(module)) for module in modules}
    by_kind: dict[Hashable, _Found | None] = {}
    for module, own in found.items():
        if module in kinds:
            known = by_kind.setdefault(kinds[module], own)
            by_kind[kinds[module]] = own if own == known else None
    told = {module: by_kind.get(kinds[module]) for module in modules}
    return {module: own for module, own in told.items() if own is not None}


def _index_of(module: nn.Module) -> int | None:
    """A layer's own place among others, as it or its attention knows it."""
    return next((vars(part)["layer_idx"] for part in module.modules() if "layer_idx" in vars(part)), None)


def _attention_that_agrees(modules: Sequence[nn.Module], trial: Trial) -> list[nn.Module]:
    """Those that in all passes of `trial` give what the formula gives for the same input."""
    agreed: dict[nn.Module, bool] = {}

    def compare(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        agrees = holds(lambda: attentions_agree(module, _attention_forward, args, kwargs))
        agreed[module] = agreed.get(module, True) and agrees

    handles = [module.register_forward_hook(compare, with_kwargs=True) for module in modules]
    try:
        if modules:
            trial.run()
    finally:
        for handle in handles:
            handle.remove()
    return list(_of_all_kinds(modules, {module: agrees or None for module, agrees in agreed.items()}))


def _attention_forward(
    module: nn.Module, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], *args: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    batch = current_input_batch()
    assert batch is not None, "the packed attention ran outside of a packed pass"
    query = _heads(module, module.q_proj(hidden_states), "q_norm")  # type: ignore[operator]
    key = _heads(module, module.k_proj(hidden_states), "k_norm")  # type: ignore[operator]
    value = _heads(module, module.v_proj(hidden_states), None)  # type: ignore[operator]
    cos, sin = position_embeddings  # [1, tokens, head_dim]
    native_ops.rotate(query, key, cos[0], sin[0])
    out = packed_attention(batch, module, query, key, value)
    return module.o_proj(out.view(1, batch.num_tokens, -1)), None  # type: ignore[operator]


def _heads(module: nn.Module, states: Tensor, norm_name: str | None) -> Tensor:  # [tokens, heads, head_dim]
    """Projected states, normed all together or head by head."""
    norm = None if norm_name is None else getattr(module, norm_name, None)
    if norm is not None and norm.weight.numel() == states.shape[-1]:
        states, norm = norm(states), None
    heads = states.view(states.shape[-2], -1, module.head_dim)  # type: ignore[call-overload]
    return heads if norm is None else norm(heads)


# Whole decoder layers


def _class_with(former: type[nn.Module], forward: Callable[[type[nn.Module], str], Any]) -> type[nn.Module]:
    known = _subclasses.get((former, forward))
    if known is None:
        known = _subclasses[former, forward] = _with_forward(former, forward(former, _STACK))
    return known


def _layers_with_attention(base: PreTrainedModel, cache: KeyValueCache) -> list[nn.Module]:
    """The members of lists of modules that have one attention module each."""
    lists = [module for module in base.modules() if isinstance(module, nn.ModuleList)]
    members = [layer for one in lists for layer in one if layer not in cache.shapes]
    return [layer for layer in members if sum(module in cache.shapes for module in layer.modules()) == 1]


def _seen(layers: Sequence[nn.Module], trial: Trial) -> list[list[tuple[nn.Module, Any, Any]]]:
    """The layers of each pass through all of them, with what they were given and gave."""
    seen: dict[object, list[tuple[nn.Module, Any, Any]]] = {}  # by pass

    def see(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        seen.setdefault(current_input_batch(), []).append((layer, args[0] if args else None, states_of(output)))

    if layers:
        with hooked(layers, see):
            trial.run_all()
    return list(seen.values())
