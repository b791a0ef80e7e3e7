"""Joining a transformers model to packed passes through its public attention interface."""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from loraplex.engine.attention import packed_attention
from loraplex.engine.kv_cache import AttentionTerms, LayerShape
from loraplex.engine.packing import current_batch
from loraplex.errors import BaseModelError
from loraplex.layers.fronts import AttentionFront, Behind, FrontHandle
from loraplex.layers.joining import join_front

_probe = threading.local()


class Attachment:
    """A base model whose attention, decoder and output layer know packed passes; outside of one it is what it was.

    Our attention function stands in front of the model's own, which other threads go on using meanwhile.
    """

    def __init__(self, base: PreTrainedModel) -> None:
        self._base = base
        self._handles: list[RemovableHandle | FrontHandle] = []
        output = base.get_output_embeddings()
        if getattr(base.config, "is_encoder_decoder", False) or output is None or not base.can_generate():
            raise BaseModelError(
                f"{type(base).__name__} is no causal language model, which the engine needs. Use "
                "MultiLoraModel.forward or generate for it."
            )
        handle, _ = join_front(base, _FRONT, user="the engine", instead="Use MultiLoraModel.generate for it.")
        self._handles.append(handle)
        self._handles.append(output.register_forward_pre_hook(_select_tokens))
        self._handles.append(base.base_model.register_forward_hook(_keep_hidden))
        try:
            self.shapes = self._find_layers()
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Give the base model back as it was; what else stands in front of its attention stays."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _find_layers(self) -> dict[nn.Module, LayerShape]:
        """Run two tokens and see which modules attend, and what they keep for each token."""
        _probe.shapes = {}
        try:
            with torch.no_grad():
                self._base(input_ids=torch.tensor([[1, 2]], device=self._base.device), use_cache=False)
            shapes: dict[nn.Module, LayerShape] = _probe.shapes
        finally:
            del _probe.shapes
        if not shapes:
            raise BaseModelError(
                f"no module of {type(self._base).__name__} called the attention function, so its keys and values can't "
                "be kept by the engine. Use MultiLoraModel.generate for it."
            )
        return shapes


def attend(
    former: Behind,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """The base model's attention function: over the packed batch that is current, else the former one."""
    batch = current_batch()
    if batch is not None:
        q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
        return packed_attention(batch, module, q, k, v, _terms(query, options)).unsqueeze(0), None
    shapes = getattr(_probe, "shapes", None)
    if shapes is not None:
        _check_terms(options)
        shapes[module] = LayerShape(
            terms=_terms(query, options),
            num_kv_heads=key.shape[1],
            key_dim=key.shape[-1],
            value_dim=value.shape[-1],
            dtype=key.dtype,
        )
    return former(module, query, key, value, attention_mask, **options)


def _check_terms(options: dict[str, Any]) -> None:
    unknown = _FRONT.unknown_terms(options)
    if unknown:
        raise BaseModelError(
            f"the base model's attention has the terms {unknown}, which the engine doesn't know. Use "
            "MultiLoraModel.generate for this model."
        )


def _terms(query: Tensor, options: dict[str, Any]) -> AttentionTerms:
    scaling = options.get("scaling")
    return AttentionTerms(
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=options.get("sliding_window"),
        softcap=options.get("softcap"),
    )


def _mask(former: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """No mask for a packed batch, whose attention function knows what a token may see."""
    return None if current_batch() is not None else former(*args, **options)


# Outside of the front that serves residuals, captures and steering of `generate`: a packed pass serves its own.
_FRONT = AttentionFront(place=3, attend=attend, computes=frozenset({"softcap"}), mask=_mask)


def _select_tokens(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    """The output layer computes only the logits that are asked for; for many models it is a fifth of the work."""
    batch = current_batch()
    if batch is None:
        return None
    if batch.wants_hidden and batch.last_hidden is None:  # some models (OPT) call their decoder past its own model
        batch.last_hidden = args[0][0]
    if batch.selected is None or args[0].shape[1] != batch.num_tokens:  # another engine's hook has selected already
        return None
    return (args[0][:, batch.selected], *args[1:])


def _keep_hidden(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    batch = current_batch()
    if batch is not None and batch.wants_hidden:
        batch.last_hidden = output.last_hidden_state[0]
