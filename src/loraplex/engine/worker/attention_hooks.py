"""Joining a transformers model to packed passes through its public attention interface."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from loraplex.engine.kv.kv_cache import LayerShape
from loraplex.engine.worker.attention import packed_attention
from loraplex.engine.worker.attention_probe import check_cache, probe_attention
from loraplex.engine.worker.input_batch import current_input_batch
from loraplex.engine.worker.rotary import RotaryPositions
from loraplex.errors import BaseModelError
from loraplex.layers.attention.check import install_checked
from loraplex.layers.attention.interface import (
    AttentionCall,
    AttentionFunction,
    AttentionHandle,
    AttentionOutput,
    AttentionOwner,
)
from loraplex.layers.base.decoder import find_decoder

UNKNOWN_LENGTH = 8192  # tokens, for a model whose configuration doesn't say


class AttentionHooks:
    """A base model whose attention, decoder and output layer know packed passes; outside of one it is what it was.

    Our attention function stands before the model's own, which other threads go on using meanwhile.
    """

    def __init__(self, base: PreTrainedModel, longest: int = UNKNOWN_LENGTH) -> None:
        """No sequence is longer than `longest` tokens. Raises BaseModelError."""
        self._rotary: RotaryPositions | None = None
        self._handles: list[RemovableHandle | AttentionHandle] = []
        output = base.get_output_embeddings()
        if getattr(base.config, "is_encoder_decoder", False) or output is None or not base.can_generate():
            raise BaseModelError(
                f"{type(base).__name__} is no causal language model, which the engine needs. Use "
                "MultiLoraModel.forward or generate for it."
            )
        check_cache(base)
        handle, _ = install_checked(base, PACKED_ATTENTION)
        self._handles.append(handle)
        self._handles.append(output.register_forward_pre_hook(_select_tokens))
        decoder = find_decoder(base)
        if decoder is not None:  # mixtures, which read its states, are refused without one
            self._handles.append(decoder.register_forward_hook(_keep_hidden))
        try:
            self.shapes: dict[nn.Module, LayerShape]
            self.shapes, rotary_calls = probe_attention(base, longest)
            self._rotary = RotaryPositions(base, rotary_calls, longest)
            self.lengths = self._rotary.rule
        except BaseException:
            self.detach()
            raise

    def forget_lengths(self) -> None:
        """Let positions that depend on a sequence's length be those of a fresh model in the next pass of its own."""
        if self._rotary is not None:
            self._rotary.forget()

    def detach(self) -> None:
        """Give the base model back as it was; what others have installed stays."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._rotary is not None:
            self._rotary.leave()


def _run(call: AttentionCall) -> AttentionOutput:
    """Attend over the packed batch that is current; without one, what is behind does."""
    batch = current_input_batch()
    if batch is None:
        return call.run_inner()
    q, k, v = (states[0].transpose(0, 1) for states in (call.query, call.key, call.value))
    return packed_attention(batch, call.module, q, k, v).unsqueeze(0), None


def _mask(former: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """No mask for a packed batch, whose attention function knows what a token may see."""
    return former(*args, **options) if current_input_batch() is None else None


PACKED_ATTENTION = AttentionFunction(
    name="the engine",
    owner=AttentionOwner.ENGINE,
    run=_run,
    terms=frozenset({"softcap", "s_aux"}),
    instead="Use MultiLoraModel.generate for it.",
    mask=_mask,
)


def _select_tokens(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    """The output layer computes only the logits that are asked for; for many models it is a fifth of the work."""
    batch = current_input_batch()
    if batch is None:
        return None
    if batch.wants_hidden and batch.last_hidden is None:  # some models (OPT) call their decoder past its own model
        batch.last_hidden = args[0][0]
    if batch.selected is None or args[0].shape[1] != batch.num_tokens:  # another engine's hook has selected already
        return None
    return (args[0][:, batch.selected], *args[1:])


def _keep_hidden(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    batch = current_input_batch()
    if batch is not None and batch.wants_hidden:
        batch.last_hidden = output.last_hidden_state[0]
