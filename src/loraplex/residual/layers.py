"""Attention layers of a transformers model, joined to the current attention scope."""

from contextvars import Context
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from loraplex.errors import BaseModelError
from loraplex.residual.attending import RESIDUAL_FRONT, AttentionProbe, give_number, layer_number, take_number
from loraplex.residual.config import BaseIdentity
from loraplex.residual.joining import join_front, leave_front, own_implementation
from loraplex.residual.scope import current_attention, use_attention

# Implementations whose weights are those that are computed here.
_KNOWN_IMPLEMENTATIONS = ("eager", "sdpa")


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
        self._handles: list[RemovableHandle] = []
        self._modules: list[nn.Module] = []
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
        self._is_joined = True

    def detach(self) -> None:
        """Give the base model back as it was; once."""
        for handle in self._handles:
            handle.remove()
        for module in self._modules:
            take_number(module)
        self._handles, self._modules = [], []
        if self._is_joined:
            self._is_joined = False
            leave_front(self._base, RESIDUAL_FRONT)

    def _join(self) -> None:
        self._is_joined = False
        name = type(self._base).__name__
        if getattr(self._base.config, "is_encoder_decoder", False):
            raise BaseModelError(
                f"{name} is an encoder-decoder; residuals, capture and steering work on decoder-only and encoder-only "
                "models. Use a causal language model."
            )
        implementation = own_implementation(self._base)
        if implementation not in _KNOWN_IMPLEMENTATIONS:
            raise BaseModelError(
                f"{name} runs on attn_implementation={implementation!r}; residuals, capture and steering need one of "
                f"{list(_KNOWN_IMPLEMENTATIONS)}. Load the base model with attn_implementation='sdpa'."
            )
        if not join_front(self._base, RESIDUAL_FRONT):
            raise BaseModelError(
                f"{name} doesn't follow transformers' attention interface, so its attention can't be captured, steered "
                "or given residuals. Use a model of transformers that does (most do)."
            )
        self._is_joined = True

    def _run_probe(self, probe: AttentionProbe) -> None:
        with torch.no_grad(), use_attention(probe):
            self._base(input_ids=torch.tensor([[1, 2]], device=self._base.device), use_cache=False)

    def _find(self) -> dict[int, AttentionLayer]:
        """Run two tokens and see which modules call the attention function, and with how many heads."""
        paths = {module: path for path, module in self._base.named_modules()}
        probe = AttentionProbe()
        Context().run(self._run_probe, probe)  # none of what a call that runs now has made current
        hidden_size = self._base.config.get_text_config().hidden_size
        layers = {}
        for order, (module, num_heads) in enumerate(probe.found.items()):
            number = getattr(module, "layer_idx", None)
            number = order if number is None else int(number)
            layers[number] = AttentionLayer(
                number=number, path=paths[module], num_heads=num_heads, hidden_size=hidden_size
            )
            give_number(module, number)
            self._modules.append(module)
            self._handles.append(module.register_forward_hook(add_residuals, with_kwargs=True))
        if not layers or len(layers) != len(probe.found):
            raise BaseModelError(
                f"{type(self._base).__name__} has no attention layers that can be told apart by number: "
                f"{[paths[module] for module in probe.found]}. Use a causal language model of transformers."
            )
        return layers


def add_residuals(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """A forward hook on an attention block: adds the residuals of the current scope's rows to the block's output."""
    scope = current_attention()
    if scope is None:
        return None
    layer = layer_number(module)
    if layer is None or layer not in scope.pending:
        return None
    x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    total = scope.add_residuals(layer, x, output[0] if isinstance(output, tuple) else output)
    return (total, *output[1:]) if isinstance(output, tuple) else total


def _public_name(name_or_path: str | None) -> str | None:
    """A hub id as it is, of a local folder the last part: where it lies is nobody else's concern."""
    return Path(name_or_path).name if name_or_path and Path(name_or_path).is_dir() else name_or_path or None
