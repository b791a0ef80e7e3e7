"""What stands before a base model's attention and behind its blocks: weights, captures, steering and residuals."""

from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from loraplex.errors import RequestError
from loraplex.layers.attention.interface import AttentionCall, AttentionFunction, AttentionOutput, AttentionOwner
from loraplex.residual.attention_weights import AttentionWeights
from loraplex.residual.scope import AttentionScope, current_attention

# By attention module of a model that RESIDUALS is installed on: its number.
_numbers: "WeakKeyDictionary[nn.Module, int]" = WeakKeyDictionary()


def give_number(module: nn.Module, number: int) -> None:
    """Let the hooks serve an attention module under a number."""
    _numbers[module] = number


def take_number(module: nn.Module) -> None:
    """Let them serve it no more."""
    _numbers.pop(module, None)


def layer_number(module: nn.Module) -> int | None:
    """An attention module's number; None for one that isn't served."""
    return _numbers.get(module)


def weights_of(call: AttentionCall, sequences: Tensor, **steered: Any) -> AttentionWeights:
    """The weights of some of a call's sequences."""
    return AttentionWeights(
        call.query,
        call.key,
        call.mask,
        sequences=sequences,
        scaling=call.scale,
        softcap=call.options.get("softcap"),
        is_causal=call.is_causal,
        position_bias=call.options.get("position_bias"),
        **steered,
    )


def _run(call: AttentionCall) -> AttentionOutput:
    """What the model attends to, and beside it what the current scope asks for."""
    output, own_weights = call.run_inner()
    scope, layer = current_attention(), layer_number(call.module)
    if layer is None or not isinstance(scope, AttentionScope):
        return output, own_weights
    first_key = scope.feed(layer, call.query.shape[2]) - call.key.shape[2]
    plan = scope.plan(layer, call.query)
    if plan is None:
        return output, own_weights
    unknown = RESIDUALS.unknown_terms(call.options)
    if unknown:
        raise RequestError(RESIDUALS.refusal(type(call.module).__name__, unknown))
    scope.check_whole(layer)
    num_keys = call.key.shape[2]
    weights = weights_of(
        call,
        plan.sequences,
        log_strength=plan.log_strength(scope.num_heads[layer], first_key, num_keys),
        shares=plan.shares(first_key, num_keys),
        first_key=first_key,
    )
    plan.capture(weights)
    if plan.links:
        scope.pending[layer] = weights
    if plan.steered:
        output = _steer(call, weights, plan.steered_places, output)
    return output, own_weights


# What sparse attention leaves out is in its mask, for the implementations that are served.
RESIDUALS = AttentionFunction(
    name="a residual, capture or steering",
    owner=AttentionOwner.RESIDUALS,
    run=_run,
    terms=frozenset({"softcap", "position_bias", "block_indices"}),
    instead="Run rows without these, or a model of transformers with plain attention (most have it).",
)


def _steer(call: AttentionCall, weights: AttentionWeights, places: Tensor, output: Tensor) -> Tensor:
    """The steered rows once more, by the same function, with a mask that holds their strengths."""
    rows, options = weights.sequences[places], call.options
    bias = options.get("position_bias")
    if bias is not None and bias.shape[0] > 1:
        options = {**options, "position_bias": bias[rows]}
    mask = weights.steered_mask(places)
    part = AttentionCall(
        call.module, call.query[rows], call.key[rows], call.value[rows], mask, options, call.own, call.inner
    )
    return output.index_copy(0, rows, part.run_inner()[0])


def block_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The normed input of an attention block, from its arguments."""
    return kwargs["hidden_states"] if "hidden_states" in kwargs else args[0] if args else None


def block_output(output: Any) -> Any:
    """The hidden states among an attention block's outputs."""
    return output[0] if isinstance(output, tuple) else output


def add_residuals(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """A forward hook on an attention block: adds the residuals of the current scope's rows to the block's output."""
    scope = current_attention()
    if scope is None:
        return None
    layer = layer_number(module)
    if layer is None or layer not in scope.pending:
        return None
    total = scope.add_residuals(layer, block_input(args, kwargs), block_output(output))
    return (total, *output[1:]) if isinstance(output, tuple) else total
