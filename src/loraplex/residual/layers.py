"""Attention layers of a transformers model, joined to the current attention scope."""

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from loraplex.errors import BaseModelError
from loraplex.layers.attention_interface import FrontHandle
from loraplex.layers.attention_join import NUM_TOKENS, AttentionCall, Watched, join_front, run_plain, watching
from loraplex.residual.cache import FollowedCache
from loraplex.residual.config import BaseFingerprint
from loraplex.residual.hooks import RESIDUAL_FRONT, give_number, layer_number, take_number
from loraplex.residual.scope import current_attention
from loraplex.residual.seen import block_input, block_output, check_block, check_call

# Implementations whose weights are those that are computed here.
_KNOWN_IMPLEMENTATIONS = ("eager", "sdpa")
_INSTEAD = "Use a model of transformers whose attention does (most do)."


@dataclass(frozen=True, kw_only=True)
class AttentionLayer:
    """One attention module of the base model."""

    number: int  # transformers' layer_idx
    path: str
    num_heads: int
    hidden_size: int


class AttentionLayers:
    """A base model whose attention goes through the current attention scope; without one it is what it was.

    An attention function of ours stands in front of the base's. It calls that one for all rows, and computes weights
    itself, beside it, for rows that ask for them. A hook on each attention block adds residuals to its output. An
    engine may stand in front of the same base model, before or after; both leave when they like.
    """

    def __init__(self, base: PreTrainedModel) -> None:
        self._base = base
        self._handles: list[FrontHandle | RemovableHandle] = []
        self._modules: list[nn.Module] = []
        _check_kind(base)
        try:
            handle, watched = join_front(base, RESIDUAL_FRONT, user="a residual, capture or steering", instead=_INSTEAD)
            self._handles.append(handle)
            self.layers = self._find(watched)
            self.cuts_tokens = self._cuts_tokens()
            self.takes_caches = self._takes_caches()
        except BaseException:
            self.detach()
            raise
        self.num_heads = {number: layer.num_heads for number, layer in self.layers.items()}
        text_config = base.config.get_text_config(decoder=True)
        self.identity = BaseFingerprint(
            architecture=type(base).__name__,
            hidden_size=text_config.hidden_size,
            vocab_size=text_config.vocab_size,
            num_heads=tuple(self.num_heads.values()),
            name=_public_name(base.config.name_or_path),
        )

    def detach(self) -> None:
        """Give the base model back as it was; once."""
        for handle in self._handles:
            handle.remove()
        for module in self._modules:
            take_number(module)
        self._handles, self._modules = [], []

    def _find(self, watched: Watched) -> dict[int, AttentionLayer]:
        """The modules that were seen to call the attention function, checked one by one."""
        hidden_size = self._base.config.get_text_config(decoder=True).hidden_size
        paths = {module: path for path, module in self._base.named_modules()}
        found: dict[nn.Module, AttentionCall] = {}
        for call in watched.calls:
            where = f"{type(self._base).__name__}'s attention block {paths[call.module]!r}"
            check_call(call, where, again=call.module in found)
            args, kwargs, output = watched.ran[call.module]
            check_block(block_input(args, kwargs), block_output(output), hidden_size, where)
            found[call.module] = call
        layers = {}
        for order, (module, call) in enumerate(found.items()):
            number = _number(module, order)
            layers[number] = AttentionLayer(
                number=number,
                path=paths[module],
                num_heads=call.query.shape[1],
                hidden_size=hidden_size,
            )
            give_number(module, number)
            self._modules.append(module)
            self._handles.append(module.register_forward_hook(add_residuals, with_kwargs=True))
        if len(layers) != len(found):
            raise BaseModelError(
                f"{type(self._base).__name__} has attention layers that can't be told apart by number: "
                f"{[paths[module] for module in found]}. Use a causal language model of transformers."
            )
        return layers

    def _cuts_tokens(self) -> bool:
        """Whether some layers see only the tokens whose logits are wanted (those that share keys of earlier ones)."""
        if "logits_to_keep" not in inspect.signature(self._base.forward).parameters:
            return False
        with watching(self._base) as watched:
            run_plain(self._base, logits_to_keep=1)
        return len({call.query.shape[2] for call in watched.calls}) > 1

    def _takes_caches(self) -> bool:
        """Whether the model takes a cache of transformers' general kind, beside which state can be kept."""
        try:
            cache = FollowedCache(config=self._base.config)
            run_plain(self._base, past_key_values=cache, use_cache=True)
        except BaseModelError:
            return False
        return int(cache.get_seq_length()) == NUM_TOKENS


def _number(module: nn.Module, order: int) -> int:
    number = getattr(module, "layer_idx", None)
    return order if number is None else int(number)


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


def _public_name(name_or_path: str | None) -> str | None:
    """A hub id as it is, of a local folder the last part: where it lies is nobody else's concern."""
    return Path(name_or_path).name if name_or_path and Path(name_or_path).is_dir() else name_or_path or None
