"""The attention function in front of a base model's own: weights, captures and steering of the current scope's rows."""

from typing import Any

import torch
from torch import Tensor, nn

from loraplex.errors import RequestError
from loraplex.layers.attention_interface import AttentionFront, AttentionOutput, Behind
from loraplex.residual.attention_weights import AttentionWeights
from loraplex.residual.plan import LayerPlan
from loraplex.residual.scope import AttentionScope, current_attention

_NUMBER = "loraplex_attention_layer"


def give_number(module: nn.Module, number: int) -> None:
    """Give an attention module its number, as often as it is joined."""
    setattr(module, _NUMBER, (*getattr(module, _NUMBER, ()), number))


def take_number(module: nn.Module) -> None:
    """Take a number away again; with the last one the module is what it was."""
    left: tuple[int, ...] = getattr(module, _NUMBER)[:-1]
    if left:
        setattr(module, _NUMBER, left)
    else:
        delattr(module, _NUMBER)


def layer_number(module: nn.Module) -> int | None:
    """An attention module's number; None for one that isn't joined."""
    numbers: tuple[int, ...] = getattr(module, _NUMBER, ())
    return numbers[-1] if numbers else None


def attend(
    former: Behind,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> AttentionOutput:
    """The base model's attention function, and beside it what the current scope asks for.

    query [sequences, heads, queries, head_dim], key and value [sequences, kv_heads, keys, head_dim]; returns
    [sequences, queries, heads, head_dim].
    """
    output, own_weights = former(module, query, key, value, attention_mask, **options)
    scope, layer = current_attention(), layer_number(module)
    if layer is None or not isinstance(scope, AttentionScope):
        return output, own_weights
    fed = scope.feed(layer, query.shape[2])
    plan = scope.plan(layer, query)
    if plan is None:
        return output, own_weights
    _check_terms(options)
    scope.check_whole(layer)
    weights = _weights(scope, plan, layer, module, query, key, attention_mask, fed - key.shape[2], options)
    for place, buffer in plan.captures:
        buffer.keep(layer, weights, place)
    if plan.links:
        scope.pending[layer] = weights
    if plan.steered:
        places = torch.tensor([place for place, _, _ in plan.steered], device=query.device)
        output = _steer(former, module, query, key, value, weights, places, output, options)
    return output, own_weights


# Where engines' packed passes stand too, they stand outside of this one. What sparse attention leaves out is in its
# mask, for the implementations that are joined.
RESIDUAL_FRONT = AttentionFront(
    place=2, attend=attend, computes=frozenset({"softcap", "position_bias", "block_indices"})
)


def computed_terms(module: nn.Module, query: Tensor, options: dict[str, Any]) -> dict[str, Any]:
    """The terms of an attention call, as AttentionWeights takes them."""
    scaling, is_causal = options.get("scaling"), options.get("is_causal")
    return {
        "scaling": query.shape[-1] ** -0.5 if scaling is None else scaling,
        "softcap": options.get("softcap"),
        "is_causal": getattr(module, "is_causal", True) if is_causal is None else is_causal,
        "position_bias": options.get("position_bias"),
    }


def _weights(
    scope: AttentionScope,
    plan: LayerPlan,
    layer: int,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    first_key: int,
    options: dict[str, Any],
) -> AttentionWeights:
    return AttentionWeights(
        query,
        key,
        mask,
        sequences=plan.sequences,
        log_strength=plan.log_strength(scope.num_heads[layer], first_key, key.shape[2]),
        first_key=first_key,
        **computed_terms(module, query, options),
    )


def _steer(
    former: Behind,
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
    steered, _ = former(module, query[rows], key[rows], value[rows], mask, **options)
    return output.index_copy(0, rows, steered)


def _check_terms(options: dict[str, Any]) -> None:
    unknown = RESIDUAL_FRONT.unknown_terms(options)
    if unknown:
        raise RequestError(
            f"this model's attention has the terms {unknown}, which residuals, capture and steering don't know. Run "
            "these rows without them."
        )
