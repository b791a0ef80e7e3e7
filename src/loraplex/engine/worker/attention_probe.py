"""What a base model's attention modules do, seen in one forward pass of a few tokens."""

from typing import Any

from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, cache_utils
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionCacheLayerMixin
from transformers.masking_utils import sdpa_mask

from loraplex.engine.kv.kv_cache import AttentionTerms, LayerShape
from loraplex.engine.kv.mask_rule import MaskRule, mask_rule_of
from loraplex.engine.worker.rotary import Call, is_rotary
from loraplex.errors import BaseModelError
from loraplex.layers.attention.check import NUM_TOKENS, attention_block, run_plain, watching
from loraplex.layers.attention.interface import AttentionCall

# Of transformers' cache. One that keeps nothing is new in 5.20.
_KNOWN_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer, getattr(cache_utils, "DummyLayer", DynamicLayer))

Masks = list[tuple[Tensor | None, MaskRule | None]]  # that a pass made, and what they hold


def check_cache(base: PreTrainedModel) -> None:
    """Some models keep more than keys and values, of which they make something once there are enough tokens."""
    kinds = {type(layer) for layer in DynamicCache(config=base.config).layers}
    states = LinearAttentionCacheLayerMixin
    unknown = [kind.__name__ for kind in kinds if kind not in _KNOWN_LAYERS and not issubclass(kind, states)]
    if unknown:
        raise BaseModelError(
            f"{type(base).__name__} keeps something beside keys and values ({unknown[0]}), which "
            "the engine doesn't know. Use MultiLoraModel.generate for this model."
        )


def probe_attention(
    base: PreTrainedModel, longest: int
) -> tuple[dict[nn.Module, LayerShape], list[tuple[nn.Module, Call]]]:
    """How each attention module attends and what it keeps, and the calls of rotary modules.

    No sequence is longer than `longest`. Raises BaseModelError for attention that the engine doesn't know.
    """
    with watching(base, makes_masks=True) as watched:
        run_plain(base)
    masks = [(mask, _rule_of_mask(options, longest)) for mask, options in watched.masks]
    shapes = {call.module: _shape(base, call, masks) for call, _ in watched.calls}
    return shapes, [(run.module, (run.args, run.kwargs)) for run in watched.runs if is_rotary(run.module)]


def _shape(base: PreTrainedModel, call: AttentionCall, masks: Masks) -> LayerShape:
    if any(states.shape[0] != 1 or states.shape[2] != NUM_TOKENS for states in (call.query, call.key, call.value)):
        raise _unknown(base, call, "attends to something else than the tokens of its sequence")
    sinks = call.options.get("s_aux")
    return LayerShape(
        terms=AttentionTerms(
            scale=call.scale,
            mask_rule=_mask_rule(base, call, masks),
            softcap=call.options.get("softcap"),
            sinks=None if sinks is None else sinks.detach().flatten(),
        ),
        num_kv_heads=call.key.shape[1],
        key_dim=call.key.shape[-1],
        value_dim=call.value.shape[-1],
        dtype=call.key.dtype,
    )


def _mask_rule(base: PreTrainedModel, call: AttentionCall, masks: Masks) -> MaskRule:
    """What a module's tokens see, from the mask that it was given; without one, as the attention function says."""
    own = str(base.config._attn_implementation)
    if call.mask is not None:
        found = [rule for made, rule in masks if made is not None and _is_same(made, call.mask)]
        if not found:
            raise _unknown(base, call, "attends under a mask that is not one of transformers' mask functions'")
    elif own in ("sdpa", "eager"):
        found = [MaskRule() if call.is_causal and own == "sdpa" else None]
    else:  # flash attention is told a window, and its masks are nothing
        window = call.options.get("sliding_window")
        found = [rule for _, rule in masks if rule is None or rule.window == window][-1:] or [None]
    if found[-1] is None:
        raise _unknown(base, call, "sees other tokens than those before it, the last ones or those of its chunk")
    return found[-1]


def _rule_of_mask(options: dict[str, Any], longest: int) -> MaskRule | None:
    """The rule of a mask that was made by these options of transformers' mask functions; None for no known one."""

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
        return mask_rule_of(row, longest)
    except IndexError:  # a rule about the tokens of this pass
        return None


def _unknown(base: PreTrainedModel, call: AttentionCall, what: str) -> BaseModelError:
    return BaseModelError(
        f"{attention_block(base, call.module)} {what}, which the engine doesn't know. Use MultiLoraModel.generate for "
        "this model."
    )


def _is_same(made: Tensor, mask: Tensor) -> bool:
    """Whether a mask is one that was made, or a view of all of it."""
    return mask.data_ptr() == made.data_ptr() and mask.shape[-2:] == made.shape[-2:] and mask.dtype == made.dtype
