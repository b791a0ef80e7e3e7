"""Attention layers of a transformers model, joined to the current attention scope."""

import inspect
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from loraplex.errors import BaseModelError
from loraplex.layers.attention.check import (
    NUM_TOKENS,
    Watched,
    attention_block,
    install_checked,
    run_plain,
    watching,
)
from loraplex.layers.attention.interface import AttentionCall, AttentionHandle, attention_functions
from loraplex.residual.cache import FollowedCache
from loraplex.residual.fingerprint import BaseFingerprint
from loraplex.residual.hooks import (
    RESIDUALS,
    add_residuals,
    block_input,
    block_output,
    give_number,
    take_number,
    weights_of,
)

# Implementations whose weights are those that are computed here.
_KNOWN_IMPLEMENTATIONS = ("eager", "sdpa")


@dataclass(frozen=True, kw_only=True)
class AttentionLayer:
    """One attention module of the base model."""

    number: int  # transformers' layer_idx
    path: str
    num_heads: int


class AttentionLayers:
    """A base model whose attention goes through the current attention scope; without one it is what it was.

    Our attention function calls the base's for all rows, and computes weights itself, beside it, for rows that ask for
    them. A hook on each attention block adds residuals to its output. An engine may be joined to the same base model,
    before or after; both leave when they like.
    """

    def __init__(self, base: PreTrainedModel) -> None:
        self._base = base
        self._handles: list[AttentionHandle | RemovableHandle] = []
        self._modules: list[nn.Module] = []
        _check_kind(base)
        try:
            handle, watched = install_checked(base, RESIDUALS)
            self._handles.append(handle)
            self.layers = self._find(watched)
            self.cuts_tokens = self._cuts_tokens()
            self.takes_caches = self._takes_caches()
        except BaseException:
            self.detach()
            raise
        self.num_heads = {number: layer.num_heads for number, layer in self.layers.items()}
        self.identity = base_fingerprint(base, tuple(self.num_heads.values()))

    def detach(self) -> None:
        """Give the base model back as it was; what others have joined stays."""
        for handle in self._handles:
            handle.remove()
        for module in self._modules:
            if RESIDUALS not in attention_functions(module):
                take_number(module)
        self._handles, self._modules = [], []

    def _find(self, watched: Watched) -> dict[int, AttentionLayer]:
        """The modules that were seen to call the attention function, checked one by one."""
        hidden_size = self._base.config.get_text_config(decoder=True).hidden_size
        paths = {module: path for path, module in self._base.named_modules()}
        runs = {run.module: run for run in watched.runs}
        layers = {}
        for order, (call, output) in enumerate(watched.calls):
            module, where = call.module, attention_block(self._base, call.module)
            _check_output(call, output, where)
            run = runs[module]
            _check_block(block_input(run.args, run.kwargs), block_output(run.output), hidden_size, where)
            number = getattr(module, "layer_idx", None)
            number = order if number is None else int(number)
            layers[number] = AttentionLayer(number=number, path=paths[module], num_heads=call.query.shape[1])
            give_number(module, number)
            self._modules.append(module)
            self._handles.append(module.register_forward_hook(add_residuals, with_kwargs=True, prepend=True))
        if len(layers) != len(watched.calls):
            raise BaseModelError(
                f"{type(self._base).__name__} has attention layers that can't be told apart by number: "
                f"{[paths[call.module] for call, _ in watched.calls]}. Use a causal language model of transformers."
            )
        return layers

    def _cuts_tokens(self) -> bool:
        """Whether some layers see only the tokens whose logits are wanted (those that share keys of earlier ones)."""
        if "logits_to_keep" not in inspect.signature(self._base.forward).parameters:
            return False
        with watching(self._base) as watched:
            run_plain(self._base, logits_to_keep=1)
        return len({call.query.shape[2] for call, _ in watched.calls}) > 1

    def _takes_caches(self) -> bool:
        """Whether the model takes a cache of transformers' general kind, beside which state can be kept."""
        try:
            cache = FollowedCache(config=self._base.config)
            run_plain(self._base, past_key_values=cache, use_cache=True)
        except BaseModelError:
            return False
        return int(cache.get_seq_length()) == NUM_TOKENS


def base_fingerprint(base: PreTrainedModel, num_heads: tuple[int, ...] = ()) -> BaseFingerprint:
    """What residuals find in a base model; without heads where its attention wasn't looked at."""
    text_config = base.config.get_text_config(decoder=True)
    return BaseFingerprint(
        architecture=type(base).__name__,
        hidden_size=text_config.hidden_size,
        vocab_size=text_config.vocab_size,
        num_heads=num_heads,
        name=_public_name(base.config.name_or_path),
    )


def _check_kind(base: PreTrainedModel) -> None:
    name = type(base).__name__
    if getattr(base.config, "is_encoder_decoder", False):
        raise BaseModelError(
            f"{name} is an encoder-decoder; residuals, capture and steering work on decoder-only and encoder-only "
            "models. Use a causal language model."
        )
    implementation = base.config.get_text_config(decoder=True)._attn_implementation
    if implementation not in _KNOWN_IMPLEMENTATIONS:
        raise BaseModelError(
            f"{name} runs on attn_implementation={implementation!r}; residuals, capture and steering need one of "
            f"{list(_KNOWN_IMPLEMENTATIONS)}. Load the base model with attn_implementation='sdpa'."
        )


def _check_output(call: AttentionCall, output: Tensor, where: str) -> None:
    """Raise BaseModelError unless our weights, applied to the values, are a call's output up to rounding."""
    weights = weights_of(call, torch.arange(len(call.query), device=call.query.device))
    value = call.value.to(torch.promote_types(call.value.dtype, torch.float32))
    ours = weights.apply(value).transpose(1, 2)
    # A logit is rounded in proportion to its size, which is at most |q| |k|, and a weight changes by as much.
    largest = call.query.float().norm(dim=-1).max() * call.key.float().norm(dim=-1).max() * abs(call.scale)
    allowed = _precision(output) * value.abs().max() * (16 + 4 * largest)
    if ours.shape != output.shape or not bool(((ours - output).abs() <= allowed).all()):
        raise BaseModelError(
            f"{where} gives something else than softmax(q k^T * scaling) v with its mask: it has a term that is not "
            f"known here, beside {sorted(call.options)}. {RESIDUALS.instead}"
        )


def _check_block(x: Any, output: Any, hidden_size: int, where: str) -> None:
    """Raise BaseModelError unless a block reads and writes hidden states [sequences, tokens, hidden]."""
    for what, states in (("reads", x), ("writes", output)):
        if not isinstance(states, Tensor) or states.dim() != 3 or states.shape[2] != hidden_size:
            found = list(states.shape) if isinstance(states, Tensor) else type(states).__name__
            raise BaseModelError(
                f"{where} {what} {found}, where residuals need [sequences, tokens, {hidden_size}]. {RESIDUALS.instead}"
            )


def _precision(tensor: Tensor) -> float:
    """The relative precision of attention, whose softmax may be float32's, and products less where torch may round."""
    rounds = torch.get_float32_matmul_precision() != "highest" or tensor.device.type != "cpu"
    dtypes = (tensor.dtype, torch.bfloat16 if rounds else torch.float32)
    return max(torch.finfo(dtype).eps for dtype in dtypes)


def _public_name(name_or_path: str | None) -> str | None:
    """A hub id as it is, of a local folder the last part: where it lies is nobody else's concern."""
    return Path(name_or_path).name if name_or_path and os.path.isdir(name_or_path) else name_or_path or None
