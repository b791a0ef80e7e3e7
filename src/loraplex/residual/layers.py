"""Attention layers of a transformers model, joined to the current attention scope."""

import sys
import threading
from collections.abc import Callable
from contextvars import Context
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from loraplex.errors import BaseModelError, RequestError
from loraplex.residual.chain import run_chain
from loraplex.residual.config import BaseIdentity
from loraplex.residual.scope import AttentionScope, current_attention, use_attention
from loraplex.residual.weights import AttentionWeights

# Our attention functions, by the name that transformers knows them under, and those that they stand in front of.
JOINED = {"loraplex_sdpa": "sdpa", "loraplex_eager": "eager"}
_KEY = "loraplex_attention_layer"
# What attention functions may be given that changes the weights in a way that is not computed here.
_UNKNOWN_TERMS = ("s_aux", "cache", "indices")

AttentionOutput = tuple[Tensor, Tensor | None]


@dataclass(frozen=True, kw_only=True)
class AttentionLayer:
    """One attention module of the base model."""

    number: int  # transformers' layer_idx
    path: str
    num_heads: int
    hidden_size: int


class AttentionLayers:
    """A base model whose attention goes through the current attention scope; without one it is what it was.

    The base's attention function is replaced by one of ours, through transformers' public attention interface. It calls
    the former one for all rows, and computes weights itself, beside it, for rows that ask for them. A hook on each
    attention block adds residuals to its output.
    """

    def __init__(self, base: PreTrainedModel) -> None:
        self._base = base
        self._handles: list[RemovableHandle] = []
        self._modules: list[nn.Module] = []
        self._before = base.config._attn_implementation
        self._join()
        try:
            self.layers = self._find()
        except BaseException:
            self.detach()
            raise
        self.num_heads = {number: layer.num_heads for number, layer in self.layers.items()}
        self.identity = BaseIdentity(
            architecture=type(base).__name__,
            hidden_size=next(iter(self.layers.values())).hidden_size,
            vocab_size=base.config.get_text_config().vocab_size,
            num_heads=tuple(self.num_heads.values()),
            name=_public_name(base.config.name_or_path),
        )

    def detach(self) -> None:
        """Give the base model back as it was."""
        for handle in self._handles:
            handle.remove()
        for module in self._modules:
            delattr(module, _KEY)
        self._handles, self._modules = [], []
        self._base.set_attn_implementation(self._before)

    def _join(self) -> None:
        name = type(self._base).__name__
        if getattr(self._base.config, "is_encoder_decoder", False):
            raise BaseModelError(
                f"{name} is an encoder-decoder; residuals, capture and steering work on decoder-only and encoder-only "
                "models. Use a causal language model."
            )
        joined = next((joined for joined, former in JOINED.items() if former == self._before), None)
        if joined is None:
            raise BaseModelError(
                f"{name} runs on attn_implementation={self._before!r}; residuals, capture and steering need one of "
                f"{sorted(JOINED.values())}. Load the base model with attn_implementation='sdpa'."
            )
        _register()
        self._base.set_attn_implementation(joined)
        if self._base.config._attn_implementation != joined:
            raise BaseModelError(
                f"{name} doesn't follow transformers' attention interface, so its attention can't be captured, steered "
                "or given residuals. Use a model of transformers that does (most do)."
            )

    def _run_probe(self, probe: "_Probe") -> None:
        with torch.no_grad(), use_attention(probe):
            self._base(input_ids=torch.tensor([[1, 2]], device=self._base.device), use_cache=False)

    def _find(self) -> dict[int, AttentionLayer]:
        """Run two tokens and see which modules call the attention function, and with how many heads."""
        paths = {module: path for path, module in self._base.named_modules()}
        probe = _Probe()
        Context().run(self._run_probe, probe)  # none of what a call that runs now has made current
        layers = {}
        for order, (module, num_heads) in enumerate(probe.found.items()):
            number = getattr(module, "layer_idx", None)
            number = order if number is None else int(number)
            hidden_size = self._base.config.get_text_config().hidden_size
            layers[number] = AttentionLayer(
                number=number, path=paths[module], num_heads=num_heads, hidden_size=hidden_size
            )
            setattr(module, _KEY, number)
            self._modules.append(module)
            self._handles.append(module.register_forward_hook(add_residuals, with_kwargs=True))
        if not layers or len(layers) != len(probe.found):
            raise BaseModelError(
                f"{type(self._base).__name__} has no attention layers that can be told apart by number: "
                f"{[paths[module] for module in probe.found]}. Use a causal language model of transformers."
            )
        return layers


def _public_name(name_or_path: str | None) -> str | None:
    """A hub id as it is, of a local folder the last part: where it lies is nobody else's concern."""
    return Path(name_or_path).name if name_or_path and Path(name_or_path).is_dir() else name_or_path or None


class _Probe(AttentionScope):
    """A scope that only notes which modules attend."""

    def __init__(self) -> None:
        super().__init__(rows=(), num_heads={}, paddings=())
        self.found: dict[nn.Module, int] = {}


_registering = threading.Lock()


def _register() -> None:
    with _registering:
        for joined, former in JOINED.items():
            if joined not in ALL_ATTENTION_FUNCTIONS:
                AttentionMaskInterface.register(joined, ALL_MASK_ATTENTION_FUNCTIONS[former])
                AttentionInterface.register(joined, partial(attend, former))


def attend(
    former: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> AttentionOutput:
    """The base model's attention function: the former one, and beside it what the current scope asks for.

    query [sequences, heads, queries, head_dim], key and value [sequences, kv_heads, keys, head_dim]; returns
    [sequences, queries, heads, head_dim].
    """
    output, _ = _former(former, module)(module, query, key, value, mask, **options)
    scope = current_attention()
    if scope is None:
        return output, None
    if isinstance(scope, _Probe):
        scope.found[module] = query.shape[1]
        return output, None
    layer = getattr(module, _KEY, None)
    if layer is None:
        return output, None
    fed = scope.feed(layer, query.shape[2])
    plan = scope.plan(layer, query)
    if plan is None:
        return output, None
    _check_terms(options)
    is_causal = options.get("is_causal")
    num_keys = key.shape[2]
    weights = AttentionWeights(
        query,
        key,
        mask,
        sequences=plan.sequences,
        scaling=query.shape[-1] ** -0.5 if options.get("scaling") is None else options["scaling"],
        softcap=options.get("softcap"),
        is_causal=getattr(module, "is_causal", True) if is_causal is None else is_causal,
        position_bias=options.get("position_bias"),
        log_strength=scope.log_strength(plan, layer, fed - num_keys, num_keys),
        first_key=fed - num_keys,
    )
    for place, buffer in plan.captures:
        buffer.keep(layer, weights, place)
    if plan.links:
        scope.pending[layer] = weights
    if plan.steered:
        places = torch.tensor([place for place, _, _ in plan.steered], device=query.device)
        output = _steer(former, module, query, key, value, weights, places, output, options)
    return output, None


def _steer(
    former: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: AttentionWeights,
    places: Tensor,  # of the steered rows among those of the weights
    output: Tensor,
    options: dict[str, Any],
) -> Tensor:
    """The steered rows once more, by the same function, with a mask that holds their strengths."""
    rows, mask = weights.sequences[places], weights.steered_mask(places)
    bias = options.get("position_bias")
    if bias is not None and bias.shape[0] > 1:
        options = {**options, "position_bias": bias[rows]}
    steered, _ = _former(former, module)(module, query[rows], key[rows], value[rows], mask, **options)
    return output.index_copy(0, rows, steered)


def add_residuals(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """A forward hook on an attention block: adds the residuals of the current scope's rows to the block's output."""
    scope = current_attention()
    layer = getattr(module, _KEY)
    if scope is None or layer not in scope.pending:
        return None
    weights = scope.pending.pop(layer)
    x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    plan = scope.plan(layer, x)
    assert plan is not None, "attention weights wait for a layer without residuals"
    block_output = output[0] if isinstance(output, tuple) else output
    residual = run_chain(plan, layer, x, weights, scope.state)
    for place, buffer in plan.captures:
        buffer.keep_norms(layer, residual[place].norm(dim=-1), weights.first_key + weights.num_keys - x.shape[1])
    residual = residual.to(block_output.dtype)
    whole = plan.index is None
    total = block_output + residual if whole else block_output.index_add(0, plan.sequences, residual)
    return (total, *output[1:]) if isinstance(output, tuple) else total


def _former(name: str, module: nn.Module) -> Callable[..., AttentionOutput]:
    if name != "eager":
        return ALL_ATTENTION_FUNCTIONS[name]
    # Eager attention is not registered: each architecture has its own, beside its attention class.
    function = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if function is None:
        raise BaseModelError(
            f"{type(module).__name__} has no eager attention function of the usual name. Load the base model with "
            "attn_implementation='sdpa'."
        )
    return function


def _check_terms(options: dict[str, Any]) -> None:
    present = [name for name in _UNKNOWN_TERMS if options.get(name) is not None]
    if present:
        raise RequestError(
            f"this model's attention has the terms {present}, which residuals, capture and steering don't know. Run "
            "these rows without them."
        )
