"""Whether what a model's attention blocks were seen to do is what residuals, captures and steering compute."""

from typing import Any

import torch
from torch import Tensor

from loraplex.errors import BaseModelError
from loraplex.layers.attention_join import AttentionCall
from loraplex.residual.attention_weights import AttentionWeights
from loraplex.residual.hooks import RESIDUAL_FRONT, computed_terms

_ENDING = "Residuals, capture and steering can't be used with this model."


def check_call(call: AttentionCall, where: str, *, again: bool) -> None:
    """Raise BaseModelError unless a call is a block's only one, and computes what AttentionWeights says it does."""
    if again:
        raise BaseModelError(
            f"{where} calls its attention function several times in a pass, so there is no one attention of it. "
            f"{_ENDING}"
        )
    unknown = RESIDUAL_FRONT.unknown_terms(call.options)
    if unknown:
        raise BaseModelError(f"{where} has the terms {unknown}, which are not computed here. {_ENDING}")
    if not _explains(call):
        raise BaseModelError(
            f"{where} gives something else than softmax(q k^T * scaling) v with its mask: it has a term that is not "
            f"known here, beside {sorted(call.options)}. {_ENDING}"
        )


def check_block(x: Any, output: Any, hidden_size: int, where: str) -> None:
    """Raise BaseModelError unless a block reads and writes hidden states [sequences, tokens, hidden]."""
    for what, states in (("reads", x), ("writes", output)):
        if not isinstance(states, Tensor) or states.dim() != 3 or states.shape[2] != hidden_size:
            found = list(states.shape) if isinstance(states, Tensor) else type(states).__name__
            raise BaseModelError(
                f"{where} {what} {found}, where residuals need [sequences, tokens, {hidden_size}]. {_ENDING}"
            )


def block_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The normed input of an attention block, from its arguments."""
    return kwargs["hidden_states"] if "hidden_states" in kwargs else args[0] if args else None


def block_output(output: Any) -> Any:
    """The hidden states among an attention block's outputs."""
    return output[0] if isinstance(output, tuple) else output


def _explains(call: AttentionCall) -> bool:
    """Whether the weights that are computed here, applied to the values, are the call's output up to rounding."""
    terms = computed_terms(call.module, call.query, call.options)
    sequences = torch.arange(len(call.query), device=call.query.device)
    weights = AttentionWeights(call.query, call.key, call.mask, sequences=sequences, **terms)
    value = call.value.to(torch.promote_types(call.value.dtype, torch.float32))
    ours = weights.apply(value).transpose(1, 2)
    if ours.shape != call.output.shape:
        return False
    # A logit is rounded in proportion to its size, which is at most |q| |k|, and a weight changes by as much.
    largest = call.query.float().norm(dim=-1).max() * call.key.float().norm(dim=-1).max() * abs(terms["scaling"])
    allowed = _precision(call.output) * value.abs().max() * (16 + 4 * largest)
    return bool(((ours - call.output).abs() <= allowed).all())


def _precision(tensor: Tensor) -> float:
    """The relative precision of attention, whose softmax may be float32's, and products less where torch may round."""
    rounds = torch.get_float32_matmul_precision() != "highest" or tensor.device.type != "cpu"
    dtypes = (tensor.dtype, torch.bfloat16 if rounds else torch.float32)
    return max(torch.finfo(dtype).eps for dtype in dtypes)
