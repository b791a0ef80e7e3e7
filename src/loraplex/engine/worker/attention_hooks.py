"""Joining a transformers model to packed passes through its public attention interface."""

import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from loraplex.engine.kv.kv_cache import LayerShape
from loraplex.engine.worker.attention import packed_attention
from loraplex.engine.worker.attention_probe import AttentionProbe
from loraplex.engine.worker.input_batch import current_input_batch
from loraplex.engine.worker.rotary import RotaryPositions
from loraplex.errors import BaseModelError, LoraplexError
from loraplex.layers.attention_interface import AttentionFront, Behind, FrontHandle
from loraplex.layers.attention_join import join_front
from loraplex.layers.decoder import find_decoder

_current = threading.local()  # its `probe`: the one that runs in this thread

UNKNOWN_LENGTH = 8192  # tokens, for a model whose configuration doesn't say


class AttentionHooks:
    """A base model whose attention, decoder and output layer know packed passes; outside of one it is what it was.

    Our attention function stands in front of the model's own, which other threads go on using meanwhile.
    """

    def __init__(self, base: PreTrainedModel, longest: int = UNKNOWN_LENGTH) -> None:
        """No sequence is longer than `longest` tokens. Raises BaseModelError."""
        self._base = base
        self._rotary: RotaryPositions | None = None
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
        decoder = find_decoder(base)
        if decoder is not None:  # mixtures, which read its states, are refused without one
            self._handles.append(decoder.register_forward_hook(_keep_hidden))
        try:
            probe = self._probe(longest)
            self.shapes: dict[nn.Module, LayerShape] = probe.shapes
            self._rotary = RotaryPositions(base, probe.rotary, longest)
            self.lengths = self._rotary.rule
        except BaseException:
            self.detach()
            raise

    def forget_lengths(self) -> None:
        """Let positions that depend on a sequence's length be those of a fresh model in the next pass of its own."""
        if self._rotary is not None:
            self._rotary.forget()

    def detach(self) -> None:
        """Give the base model back as it was; what else stands in front of its attention stays."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._rotary is not None:
            self._rotary.leave()

    def _probe(self, longest: int) -> AttentionProbe:
        """Run a few tokens and see which modules attend, how, and what they keep for each token."""
        name = type(self._base).__name__
        probe = _current.probe = AttentionProbe(self._base, longest, _FRONT.unknown_terms)
        try:
            probe.run()
        except LoraplexError:
            raise
        except Exception as error:
            raise BaseModelError(
                f"{name} can't run a few tokens without a cache, which the engine tries first: "
                f"{type(error).__name__}: {error}. Use MultiLoraModel.generate for it."
            ) from error
        finally:
            del _current.probe
        if not probe.shapes:
            raise BaseModelError(
                f"no module of {name} called the attention function, so its keys and values can't be kept by the "
                "engine. Use MultiLoraModel.generate for it."
            )
        return probe


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
    batch = current_input_batch()
    if batch is not None:
        q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
        return packed_attention(batch, module, q, k, v).unsqueeze(0), None
    probe: AttentionProbe | None = getattr(_current, "probe", None)
    if probe is not None:
        probe.note_attention(module, query, key, value, attention_mask, options)
    return former(module, query, key, value, attention_mask, **options)


def _mask(former: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """No mask for a packed batch, whose attention function knows what a token may see."""
    if current_input_batch() is not None:
        return None
    probe: AttentionProbe | None = getattr(_current, "probe", None)
    if probe is None:
        return former(*args, **options)
    mask = former(*args, **{**options, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})
    probe.note_mask(mask, options)
    return mask


# Outside of the front that serves residuals, captures and steering of `generate`: a packed pass serves its own.
_FRONT = AttentionFront(place=3, attend=attend, computes=frozenset({"softcap", "s_aux"}), mask=_mask)


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
