"""Residuals without any of the code that runs them: eager attention of transformers, the formula added by a hook."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from loraplex.residual.layers import AttentionLayers
from loraplex.residual.modules import LinkedLayer, LinkedResidual, SteeringVector


def as_oracle(model: PreTrainedModel, ids: Tensor) -> PreTrainedModel:
    """A model of its own on eager attention, in float64 where its code can."""
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            model.double()(input_ids=ids, use_cache=False)
    except RuntimeError:  # code that computes in float32 whatever the dtype
        model.float()
    return model


@torch.no_grad()
def own_attentions(oracle: PreTrainedModel, ids: Tensor, mask: Tensor | None = None) -> list[Tensor]:
    """The weights [rows, heads, queries, keys] of each layer that has any, as the model itself tells them."""
    output = oracle(input_ids=ids, attention_mask=mask, use_cache=False, output_attentions=True)
    return [weights for weights in output.attentions if weights is not None]


@torch.no_grad()
def logits_with(
    oracle: PreTrainedModel, layers: AttentionLayers, residual: LinkedResidual | SteeringVector, ids: Tensor
) -> Tensor:  # [rows, tokens, vocab]
    """The logits of rows without padding that all go through the residual."""
    handles = []
    for number, layer in layers.layers.items():
        if isinstance(residual, LinkedResidual):
            hook = _linked_hook(residual.layers[number], residual.config.alpha / residual.config.r)
        else:
            hook = _vector_hook(residual.vectors[number])
        handles.append(oracle.get_submodule(layer.path).register_forward_hook(hook, with_kwargs=True))
    logits: Tensor = oracle(input_ids=ids, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return logits


def _linked_hook(weights: LinkedLayer, scaling: float) -> Callable[..., Any]:
    def add(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        mix = torch.softmax(weights.head_logits.double(), dim=-1)  # [rank, heads]
        mixed = torch.einsum("kh,bhts->bkts", mix, output[1].double())
        u = torch.einsum("kd,bsd->bsk", weights.a.double(), x.double())
        v = torch.einsum("bkts,bsk->btk", mixed, u)
        return (output[0] + (scaling * v @ weights.b.double()).to(output[0].dtype), *output[1:])

    return add


def _vector_hook(vector: Tensor) -> Callable[..., Any]:
    return lambda module, args, kwargs, output: (output[0] + vector.to(output[0].dtype), *output[1:])
