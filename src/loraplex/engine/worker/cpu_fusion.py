"""Modules between the linear ones, run by one compiled operator each where a packed batch is decoded.

Not by architecture: a module is taken over if it has the parts that a formula needs and one of its kind gives what the
formula gives (agreement.py), also for large inputs and at far positions. Outside of packed passes it runs as it did.
"""

import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformers import PreTrainedModel

from loraplex.engine.kv.kv_cache import KeyValueCache
from loraplex.engine.worker import native_ops
from loraplex.engine.worker.agreement import SCALES, TOLERANCE, agree, attentions_agree, holds, random_inputs
from loraplex.engine.worker.attention import packed_attention
from loraplex.engine.worker.input_batch import InputBatch, current_input_batch
from loraplex.engine.worker.layer_stack import LayerStack, chains, layer_forward, may_be_stacked
from loraplex.engine.worker.linear_products import LinearProducts
from loraplex.layers.module_kinds import module_kind

_PLUS_ONE = "loraplex_plus_one"  # on a norm: whether it multiplies by 1 + weight (Gemma)
_STACK = "loraplex_stack"  # on a decoder layer: its stack, and its place there


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
        module_index: Mapping[nn.Module, int],
        trial: Trial,
    ) -> None:
        """`module_index` as in routing plans; `cache` has the modules that packed passes know."""
        self._taken: list[tuple[nn.Module, type[nn.Module]]] = []
        self._products = LinearProducts(base)
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
        norms: dict[Hashable, bool | None] = {}  # by kind, whether it multiplies by 1 + weight; None: it is another one
        mlps: dict[Hashable, bool] = {}
        for module in modules:
            if _may_be_norm(module):
                kind = module_kind(module)
                if kind not in norms:
                    norms[kind] = _plus_one(module)
                if norms[kind] is not None:
                    vars(module)[_PLUS_ONE] = norms[kind]
                    self._take(module, _norm_forward)
            elif _may_be_gated_mlp(module):
                kind = module_kind(module)
                if kind not in mlps:
                    mlps[kind] = holds(partial(_is_gated_mlp, module))
                if mlps[kind]:
                    self._take(module, _mlp_forward)

    def _stack_layers(
        self, base: PreTrainedModel, cache: KeyValueCache, module_index: Mapping[nn.Module, int], trial: Trial
    ) -> None:
        """Let decoder layers run together where single tokens are decoded."""
        candidates = [module for module in base.modules() if may_be_stacked(module, cache, _is_taken)]
        for run in _stacks_that_agree(candidates, module_index, trial):
            stack = LayerStack(run, module_index, _norm_terms)
            for place, layer in enumerate(run):
                vars(layer)[_STACK] = (stack, place)
                self._take_as(layer, _layer_class(type(layer)))

    def _restore(self) -> None:
        for module, former in self._taken:
            module.__class__ = former
            vars(module).pop(_PLUS_ONE, None)
            vars(module).pop(_STACK, None)
        self._taken = []
        self._products.release()

    def _take(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        self._take_as(module, _subclass(type(module), forward))

    def _take_as(self, module: nn.Module, subclass: type[nn.Module]) -> None:
        self._taken.append((module, type(module)))
        module.__class__ = subclass


_fusions: "WeakKeyDictionary[PreTrainedModel, CpuFusion]" = WeakKeyDictionary()
_lock = threading.Lock()


def fuse(base: PreTrainedModel, cache: KeyValueCache, module_index: Mapping[nn.Module, int], trial: Trial) -> CpuFusion:
    """The base model's fusion, which all its engines share; each ends its use with `release`."""
    with _lock:
        known = _fusions.get(base)
        if known is None or known.num_users == 0:
            known = _fusions[base] = CpuFusion(base, cache, module_index, trial)
        known.num_users += 1
    return known


_subclasses: dict[tuple[type[nn.Module], Callable[..., Any]], type[nn.Module]] = {}


def _is_taken(module: nn.Module) -> bool:
    return type(module) in _subclasses.values()


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
    # The module's own namespace: transformers looks there for functions that belong to a class.
    return type(former.__name__, (former,), {"forward": forward, "__module__": former.__module__})


# Root mean square norms


def _may_be_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    if not type(module).__name__.endswith("RMSNorm") or not isinstance(weight, Tensor) or weight.ndim != 1:
        return False
    return isinstance(_epsilon(module), float) and not list(module.children()) and weight.dtype in TOLERANCE


def _plus_one(module: nn.Module) -> bool | None:
    """Whether it multiplies by 1 + weight, rather than by its weight; None if it does neither."""
    inputs = list(random_inputs(3, module.weight.shape[0], like=module.weight))  # type: ignore[arg-type, index]

    def is_so(plus_one: bool) -> bool:
        ours = [native_ops.rms_norm(x, module.weight, _epsilon(module), plus_one) for x in inputs]  # type: ignore[arg-type]
        return all(map(agree, ours, (module(x) for x in inputs)))

    return next((plus_one for plus_one in (False, True) if holds(partial(is_so, plus_one))), None)


def _norm_forward(module: nn.Module, x: Tensor) -> Tensor:
    return native_ops.rms_norm(x.contiguous(), module.weight, _epsilon(module), vars(module)[_PLUS_ONE])  # type: ignore[arg-type]


def _epsilon(module: nn.Module) -> Any:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


# Gated feed-forward modules


def _may_be_gated_mlp(module: nn.Module) -> bool:
    names = {name for name, _ in module.named_children()}
    if names - {"act_fn"} != {"gate_proj", "up_proj", "down_proj"}:
        return False
    gate = module.get_submodule("gate_proj")
    return isinstance(gate, nn.Linear) and gate.weight.dtype in TOLERANCE


def _is_gated_mlp(module: nn.Module) -> bool:
    gate = module.get_submodule("gate_proj")
    assert isinstance(gate, nn.Linear), "a module without gate_proj was taken for a gated one"
    inputs = random_inputs(3, gate.in_features, like=gate.weight)
    return all(agree(_mlp_forward(module, x), module(x)) for x in inputs)


def _mlp_forward(module: nn.Module, x: Tensor) -> Any:
    return module.down_proj(native_ops.gated_silu(module.gate_proj(x), module.up_proj(x)))  # type: ignore[operator]


# Attention with rotary positions


def _is_rotary_attention(module: nn.Module) -> bool:
    """Whether it has the parts and no others."""
    names = {name for name, _ in module.named_children()}
    return names == {"q_proj", "k_proj", "v_proj", "o_proj"} and isinstance(getattr(module, "head_dim", None), int)


def _of_agreed_kinds(modules: Sequence[nn.Module], agreed: Mapping[nn.Module, bool]) -> list[nn.Module]:
    """Those of kinds of which some were compared, and all of these agree."""
    kinds = {module: module_kind(module, vars(module).get("layer_idx")) for module in modules}
    tried = {kinds[module] for module in agreed} - {kinds[module] for module, agrees in agreed.items() if not agrees}
    return [module for module in modules if kinds[module] in tried]


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
    return _of_agreed_kinds(modules, agreed)


def _attention_forward(
    module: nn.Module, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], *args: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    batch = current_input_batch()
    assert batch is not None, "the packed attention ran outside of a packed pass"
    shape = (batch.num_tokens, -1, module.head_dim)
    query = module.q_proj(hidden_states).view(shape)  # type: ignore[operator]
    key = module.k_proj(hidden_states).view(shape)  # type: ignore[operator]
    value = module.v_proj(hidden_states).view(shape)  # type: ignore[operator]
    cos, sin = position_embeddings  # [1, tokens, head_dim]
    native_ops.rotate(query, key, cos[0], sin[0])
    out = packed_attention(batch, module, query, key, value)
    return module.o_proj(out.view(1, batch.num_tokens, -1)), None  # type: ignore[operator]


# Whole decoder layers


def _layer_class(former: type[nn.Module]) -> type[nn.Module]:
    known = _subclasses.get((former, layer_forward))
    if known is None:
        known = _subclasses[former, layer_forward] = _with_forward(former, layer_forward(former, _STACK))
    return known


def _norm_terms(norm: nn.Module) -> tuple[float, bool]:
    return _epsilon(norm), vars(norm)[_PLUS_ONE]


def _stacks_that_agree(
    layers: Sequence[nn.Module], module_index: Mapping[nn.Module, int], trial: Trial
) -> list[list[nn.Module]]:
    """Those that give what the formula gives in every pass of single tokens, in runs that feed each other."""
    agreed: dict[nn.Module, bool] = {}
    seen: dict[object, list[tuple[nn.Module, Any, Any]]] = {}  # by pass

    def compare(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        batch = current_input_batch()
        assert batch is not None, "the trial runs packed passes"
        if batch.num_single == batch.num_tokens:
            agrees = holds(lambda: _layers_agree(layer, module_index, batch, args, kwargs))
            agreed[layer] = agreed.get(layer, True) and agrees

    def see(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        seen.setdefault(current_input_batch(), []).append((layer, args[0] if args else None, output))

    for hook, run in ((compare, trial.run), (see, trial.run_all)):
        handles = [layer.register_forward_hook(hook, with_kwargs=True) for layer in layers]
        try:
            if layers:
                run()
        finally:
            for handle in handles:
                handle.remove()
    return chains(_of_agreed_kinds(layers, agreed), list(seen.values()))


def _layers_agree(
    layer: nn.Module,
    module_index: Mapping[nn.Module, int],
    batch: InputBatch,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> bool:
    """Whether a layer that ran with these arguments gives what the formula gives, for inputs of other sizes too."""
    positions = kwargs.get("position_embeddings")
    if not args or not isinstance(positions, tuple) or positions[0].shape != positions[1].shape:
        return False
    stack = LayerStack([layer], module_index, _norm_terms)
    agreed = True
    for scale in sorted(SCALES, key=lambda scale: scale == 1):  # 1 is the last, whose keys and values stay
        x = args[0] * scale
        agreed &= agree(stack.run(batch, x, positions), layer.forward(x, *args[1:], **kwargs))
    return agreed
