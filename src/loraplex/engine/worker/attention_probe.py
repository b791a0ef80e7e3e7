"""What a base model's attention modules do, seen in one forward pass of a few tokens."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, cache_utils
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionCacheLayerMixin
from transformers.masking_utils import sdpa_mask

from loraplex.engine.kv.kv_cache import AttentionTerms, LayerShape
from loraplex.engine.kv.mask_rule import MaskRule, mask_rule_of
from loraplex.engine.worker.rotary import Call, is_rotary
from loraplex.errors import BaseModelError

_NUM_TOKENS = 3
# What attention functions are given that says nothing about a packed pass, or is read here.
_KNOWN_TENSORS = ("position_ids", "cache_position", "s_aux")

# Of transformers' cache. One that keeps nothing is new in 5.20.
_KNOWN_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer, getattr(cache_utils, "DummyLayer", DynamicLayer))


class AttentionProbe:
    """Notes what attends, and how. The attention function and the mask function of the engine tell it."""

    def __init__(
        self, base: PreTrainedModel, longest: int, unknown_terms: Callable[[Mapping[str, Any]], list[str]]
    ) -> None:
        """No sequence is longer than `longest`; `unknown_terms` tells which terms the engine doesn't compute."""
        self.shapes: dict[nn.Module, LayerShape] = {}
        self.rotary: list[tuple[nn.Module, Call]] = []
        self._base, self._longest, self._unknown_terms = base, longest, unknown_terms
        self._own = str(base.config._attn_implementation)
        self._masks: list[tuple[Tensor | None, MaskRule | None]] = []

    def run(self) -> None:
        """Raises BaseModelError for attention that the engine doesn't know."""
        self._check_cache()

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.rotary.append((module, (args, kwargs)))

        rotary = [module for module in self._base.modules() if is_rotary(module)]
        handles = [module.register_forward_pre_hook(note, with_kwargs=True) for module in rotary]
        ids = torch.arange(1, 1 + _NUM_TOKENS, device=self._base.device)
        try:
            with torch.no_grad():
                self._base(input_ids=ids.unsqueeze(0), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()

    def _check_cache(self) -> None:
        """Some models keep more than keys and values, of which they make something once there are enough tokens."""
        kinds = {type(layer) for layer in DynamicCache(config=self._base.config).layers}
        states = LinearAttentionCacheLayerMixin
        unknown = [kind.__name__ for kind in kinds if kind not in _KNOWN_LAYERS and not issubclass(kind, states)]
        if unknown:
            raise BaseModelError(
                f"{type(self._base).__name__} keeps something beside keys and values ({unknown[0]}), which "
                "the engine doesn't know. Use MultiLoraModel.generate for this model."
            )

    def note_mask(self, mask: Tensor | None, options: dict[str, Any]) -> None:
        """A mask was made, by these options of transformers' mask functions."""

        def row(position: int) -> Tensor:
            made = sdpa_mask(
                batch_size=1,
                q_length=1,
                kv_length=position + 2,
                q_offset=position,
                mask_function=options["mask_function"],
                allow_is_causal_skip=False,
                use_vmap=options.get("use_vmap", False),
                device=options.get("device", "cpu"),
            )
            assert made is not None, "a mask was asked for that may not be left out"
            return made[0, 0, 0]

        try:
            mask_rule = mask_rule_of(row, self._longest)
        except IndexError:  # a rule about the tokens of this pass
            mask_rule = None
        self._masks.append((mask, mask_rule))

    def note_attention(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]
    ) -> None:
        """A module attends. Raises BaseModelError."""
        if module in self.shapes:
            raise self._unknown(module, "attends several times in one forward pass")
        if any(states.shape[0] != 1 or states.shape[2] != _NUM_TOKENS for states in (query, key, value)):
            raise self._unknown(module, "attends to something else than the tokens of its sequence")
        self._check_options(module, options)
        sinks = options.get("s_aux")
        self.shapes[module] = LayerShape(
            terms=AttentionTerms(
                scale=query.shape[-1] ** -0.5 if options.get("scaling") is None else float(options["scaling"]),
                mask_rule=self._sight(module, mask, options),
                softcap=options.get("softcap"),
                sinks=None if sinks is None else sinks.detach().flatten(),
            ),
            num_kv_heads=key.shape[1],
            key_dim=key.shape[-1],
            value_dim=value.shape[-1],
            dtype=key.dtype,
        )

    def _sight(self, module: nn.Module, mask: Tensor | None, options: dict[str, Any]) -> MaskRule:
        """What a module's tokens see, from the mask that it was given; without one, as the attention function says."""
        if mask is not None:
            found = [mask_rule for made, mask_rule in self._masks if made is not None and _is_same(made, mask)]
            if not found:
                raise self._unknown(module, "attends under a mask that is not one of transformers' mask functions'")
        elif self._own in ("sdpa", "eager"):
            is_causal = options.get("is_causal")
            is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
            found = [MaskRule() if is_causal and self._own == "sdpa" else None]
        else:  # flash attention is told a window, and its masks are nothing
            window = options.get("sliding_window")
            sights = [mask_rule for _, mask_rule in self._masks if mask_rule is None or mask_rule.window == window]
            found = sights[-1:] or [None]
        if found[-1] is None:
            raise self._unknown(module, "sees other tokens than those before it, the last ones or those of its chunk")
        return found[-1]

    def _check_options(self, module: nn.Module, options: dict[str, Any]) -> None:
        present = self._unknown_terms(options)
        present += [
            name
            for name, value in options.items()
            if isinstance(value, Tensor) and name not in _KNOWN_TENSORS and name not in present
        ]
        if present:
            raise self._unknown(module, f"has the terms {present}")

    def _unknown(self, module: nn.Module, what: str) -> BaseModelError:
        return BaseModelError(
            f"{type(module).__name__} of {type(self._base).__name__} {what}, which the engine doesn't know. Use "
            "MultiLoraModel.generate for this model."
        )


def _is_same(made: Tensor, mask: Tensor) -> bool:
    """Whether a mask is one that was made, or a view of all of it."""
    return mask.data_ptr() == made.data_ptr() and mask.shape[-2:] == made.shape[-2:] and mask.dtype == made.dtype
