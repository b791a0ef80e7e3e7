"""Adapters and residuals on one row alone, by hooks that follow their formulas: the oracle where PEFT can't run."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loraplex.adapters.weights import Adapter
from loraplex.layers.base.modules import embed_scale
from loraplex.residual.layers import AttentionLayer
from loraplex.residual.modules import LinkedLayer, LinkedResidual, SteeringVector

Gate = Callable[[str, Tensor], float | Tensor]  # module, input -> the gate, or one for each token [.., 1]
Hook = Callable[..., Any]  # a forward hook that is told keyword arguments
Chain = Sequence[tuple[LinkedResidual | SteeringVector, float]]  # residuals and their weights, in the order of a link


@contextmanager
def hooked(base: PreTrainedModel, hooks: Iterable[tuple[str, Hook]]) -> Iterator[PreTrainedModel]:
    """The base model with forward hooks on modules by their paths."""
    handles = [base.get_submodule(path).register_forward_hook(hook, with_kwargs=True) for path, hook in hooks]
    try:
        yield base
    finally:
        for handle in handles:
            handle.remove()


# Adapters


class Factors(NamedTuple):
    """One adapter's weights at one module."""

    lora_a: Tensor  # [rank, in]
    lora_b: Tensor  # [rank, out]
    scaling: float
    kind: str = "linear"


class HookOracle:
    """A copy of a base model, one row at a time, without a cache."""

    def __init__(self, base: PreTrainedModel) -> None:
        self.base = copy.deepcopy(base)

    @contextmanager
    def adapted(self, adapters: Mapping[str, tuple[Adapter, Gate]]) -> Iterator[PreTrainedModel]:
        """The base model with y + gate * scaling * B A x at every module of every adapter."""
        hooks = [
            (path, lora_hook(path, weights, gate))
            for adapter, gate in adapters.values()
            for path, weights in adapter.layers.items()
        ]
        with hooked(self.base, hooks) as base:
            yield base


def active_from(start: int) -> Gate:
    """An aLoRA of a row, or its beams, whose tokens are [beams, tokens], [tokens], or [.., tokens]."""

    def gate(path: str, x: Tensor) -> Tensor:
        return (torch.arange(x.shape[-2]) >= start).float().unsqueeze(-1)

    return gate


def lora_hook(path: str, weights: Any, gate: Gate) -> Hook:
    """Adds gate * scaling * B A x; `weights` are Factors, or an adapter's own."""

    def add(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor:
        x = args[0]
        if weights.kind == "embedding":
            scale = weights.scaling * embed_scale(module)
            return y + (weights.lora_a.t()[x] @ weights.lora_b) * scale * gate(path, x)
        # The gate first, as PEFT's X-LoRA has it: sparse attention chooses its keys by the last bits.
        return y + (x * gate(path, x)) @ weights.lora_a.t() @ weights.lora_b * weights.scaling

    return add


# Residuals


def as_oracle(model: PreTrainedModel) -> PreTrainedModel:
    """A model of its own on eager attention, in float64 where its code can."""
    model.set_attn_implementation("eager")
    if hasattr(model.config, "_experts_implementation"):
        model.set_experts_implementation("eager")  # torch's grouped products don't take float64
    try:
        with torch.no_grad():
            model.double()(input_ids=torch.arange(3, 12).unsqueeze(0), use_cache=False)
    except RuntimeError:  # code that computes in float32 whatever the dtype
        model.float()
    return model


@torch.no_grad()
def own_attentions(oracle: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """The weights [rows, heads, queries, keys] of each layer that has any, as the model itself tells them."""
    output = oracle(input_ids=ids, use_cache=False, output_attentions=True)
    return [weights for weights in output.attentions if weights is not None]


@torch.no_grad()
def logits_with(
    oracle: PreTrainedModel,
    layers: Mapping[int, AttentionLayer],
    chain: Chain,
    ids: Tensor,
    mask: Tensor | None = None,
) -> Tensor:  # [rows, tokens, vocab]
    """The logits of an `as_oracle` of rows that all go through the chain."""
    hooks = [(layer.path, residual_hook(number, chain)) for number, layer in layers.items()]
    with hooked(oracle, hooks):
        logits: Tensor = oracle(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return logits


def residual_hook(number: int, chain: Chain) -> Hook:
    """Adds the sum of the residuals to an attention block: each reads x with those before it added."""

    def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        x = (kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]).double()
        total = torch.zeros_like(x)
        for residual, weight in chain:
            if number not in residual.layers:
                continue
            if isinstance(residual, SteeringVector):
                total = total + weight * residual.vectors[number].double()
            else:
                scaling = weight * residual.config.alpha / residual.config.r
                total = total + linked_formula(x + total, output[1].double(), residual.layers[number], scaling)
        first = output[0] if isinstance(output, tuple) else output
        sums = torch.nan_to_num(first + total.to(first.dtype))  # padding sees nothing, of which eager attention is NaN
        return (sums, *output[1:]) if isinstance(output, tuple) else sums

    return add


def linked_formula(
    x: Tensor,  # [rows, tokens, hidden]
    attention: Tensor,  # [rows, heads, tokens, tokens]
    weights: LinkedLayer,
    scaling: float,  # weight * alpha/r
) -> Tensor:  # [rows, tokens, hidden]
    """One LinkedResidual at one layer, in float64."""
    mix = torch.softmax(weights.head_logits.double(), dim=-1)  # [rank, heads]
    mixed = torch.einsum("kh,bhts->bkts", mix, attention)
    u = torch.einsum("kd,bsd->bsk", weights.a.double(), x)
    v = torch.einsum("bkts,bsk->btk", mixed, u)
    return scaling * v @ weights.b.double()
