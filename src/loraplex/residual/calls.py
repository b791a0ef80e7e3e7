"""From what the rows of a call ask for to the scope that serves them, everything checked before anything runs."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from loraplex.errors import RequestError
from loraplex.residual.cache import FollowedCache, ResidualState, state_of
from loraplex.residual.capture import AttentionCapture, CaptureBuffer
from loraplex.residual.gates import GateResidual
from loraplex.residual.layers import AttentionLayers
from loraplex.residual.modules import check_residual_fits
from loraplex.residual.plan import RowPlans
from loraplex.residual.reft import ReftResidual
from loraplex.residual.rows import RowAttention
from loraplex.residual.scope import AttentionScope
from loraplex.residual.steering import check_steering


def make_scope(
    rows: Sequence[RowAttention],
    layers: AttentionLayers,
    attention_mask: Tensor | None,  # [rows, tokens]
    num_tokens: int,  # of the prompt, padding and what the cache holds included
    *,
    max_new_tokens: int = 0,
    fed_before: int = 0,
    cached: bool = True,
    state: ResidualState | None = None,
    record_failures: bool = False,
) -> AttentionScope:
    """Check every row and reserve its captures. Raises RequestError, TooLargeError or BaseModelMismatchError."""
    paddings = num_left_padding(attention_mask, len(rows))
    buffers = {}
    for number, row in enumerate(rows):
        for link in row.chain:
            assert not isinstance(link.residual, ReftResidual | GateResidual), "interventions are no part of attention"
            check_residual_fits(link.name, link.residual, layers.identity, layers.num_heads)
        for steering in row.steering:
            check_steering(steering, number, num_tokens - paddings[number], layers.num_heads)
        if row.capture is not None:
            buffers[number] = CaptureBuffer(
                row.capture,
                number,
                layers.num_heads,
                num_padding=paddings[number],
                prompt_stop=num_tokens,
                fed_before=fed_before,
                max_new_tokens=max_new_tokens,
                has_residuals=bool(row.chain),
            )
    return AttentionScope(
        plans=RowPlans(rows, paddings=paddings, buffers=buffers, failures={} if record_failures else None),
        num_heads=layers.num_heads,
        state=state,
        fed_before=fed_before,
        cached=cached,
    )


def forward_scope(
    rows: Sequence[RowAttention],
    layers: AttentionLayers,
    num_tokens: int,
    attention_mask: Tensor | None,
    inputs: dict[str, Any],  # of the base model's forward; gains a cache that follows, where there is none
    base: PreTrainedModel,
    *,
    record_failures: bool = False,
    new_cache: Callable[[], Any] | None = None,
) -> AttentionScope:
    """The scope of one forward pass. With a cache, u is kept beside keys and values, for passes that go on."""
    _keep_all_tokens(layers, inputs, default=0)
    by_default = getattr(base.config.get_text_config(decoder=True), "use_cache", False)
    if by_default and not layers.takes_caches:  # the model's own kind is of no use after one pass
        inputs.setdefault("use_cache", False)
    uses_cache = inputs.get("use_cache", by_default) and not base.training
    cache = _cache(rows, layers, inputs, base, uses_cache=uses_cache, new_cache=new_cache)
    fed_before = 0 if cache is None else int(cache.get_seq_length())
    return make_scope(
        rows,
        layers,
        attention_mask,
        fed_before + num_tokens,
        fed_before=fed_before,
        state=None if cache is None else state_of(cache, rows, fed_before),
        record_failures=record_failures,
    )


def generation_scope(
    rows: Sequence[RowAttention],
    layers: AttentionLayers,
    num_tokens: int,
    attention_mask: Tensor | None,
    generation: dict[str, Any],  # options of transformers' generate; gains a cache that follows, where there is none
    base: PreTrainedModel,
    *,
    record_failures: bool = False,
    new_cache: Callable[[], Any] | None = None,
) -> AttentionScope:
    """The scope of one generation, which begins with the whole prompt."""
    config = generation_config_of(base, generation)
    _check_generation(rows, config, generation)
    _keep_all_tokens(layers, generation, default=1)
    cache = _cache(rows, layers, generation, base, uses_cache=config.use_cache is not False, new_cache=new_cache)
    fed_before = 0 if cache is None else int(cache.get_seq_length())
    return make_scope(
        rows,
        layers,
        attention_mask,
        num_tokens,
        max_new_tokens=_max_new_tokens(config, num_tokens),
        fed_before=fed_before,
        cached=cache is not None or config.use_cache is not False,
        state=None if cache is None else state_of(cache, rows, fed_before),
        record_failures=record_failures,
    )


def _cache(
    rows: Sequence[RowAttention],
    layers: AttentionLayers,
    inputs: dict[str, Any],  # gains a cache that follows, where there is none
    base: PreTrainedModel,
    *,
    uses_cache: bool,
    new_cache: Callable[[], Any] | None,
) -> Any:
    """The cache of a call; None where there is none, or where the base model makes its own. Raises RequestError."""
    given = inputs.get("past_key_values")
    if given is not None or not uses_cache:
        return given
    if new_cache is None and not layers.takes_caches:
        linked = [number for number, row in enumerate(rows) if row.has_linked]
        if linked:
            raise RequestError(
                f"{type(base).__name__} takes only a cache of its own kind, beside which the residuals of the rows "
                f"{linked} can't keep what they need. Pass use_cache=False."
            )
        return None
    inputs["past_key_values"] = new_cache() if new_cache else FollowedCache(config=base.config)
    return inputs["past_key_values"]


def _keep_all_tokens(layers: AttentionLayers, inputs: dict[str, Any], *, default: int) -> None:
    """Ask for the logits of the last tokens by their places, where asking for so many cuts tokens from some layers.

    Such layers have no hidden states for the keys of other tokens, and no queries of them to capture.
    """
    wanted = inputs.get("logits_to_keep", default)
    if layers.cuts_tokens and isinstance(wanted, int) and wanted > 0:
        inputs["logits_to_keep"] = torch.arange(-wanted, 0)


def captures(
    scope: AttentionScope,
    sequences: Tensor,  # [rows, tokens]  all ids
    tokenizer: PreTrainedTokenizerBase | None,
    ends: Sequence[Sequence[int]] | None = None,  # by row: it ends at the first of these that was generated
) -> list[AttentionCapture | None]:
    """Each row's capture."""
    results: list[AttentionCapture | None] = []
    for row, padding in enumerate(scope.plans.paddings):
        buffer = scope.plans.buffers.get(row)
        if buffer is None:
            results.append(None)
            continue
        ids = sequences[row, padding:].tolist()
        ids = ids[: buffer.num_fed(ids, () if ends is None else ends[row])]
        results.append(buffer.result(ids, token_texts(ids, tokenizer)))
    return results


def token_texts(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    """Each token's text; without a tokenizer its number."""
    return [str(token) if tokenizer is None else str(tokenizer.decode([token])) for token in ids]


def num_left_padding(attention_mask: Tensor | None, num_rows: int) -> list[int]:
    """How many tokens at each row's start are masked."""
    if attention_mask is None or attention_mask.dim() != 2:
        return [0] * num_rows
    shown = attention_mask != 0
    first = shown.int().argmax(dim=1)
    return [int(place) for place in first.tolist()]


# What generate is told


def _max_new_tokens(config: GenerationConfig, num_tokens: int) -> int:
    """How many tokens a generation may add to the prompt."""
    if config.max_new_tokens is not None:
        return int(config.max_new_tokens)
    return max(1, int(config.max_length or 20) - num_tokens)


def generation_config_of(base: PreTrainedModel, generation: dict[str, Any]) -> GenerationConfig:
    """transformers' defaults, the model's and the call's, as `generate` combines them."""
    given = generation.get("generation_config") or base.generation_config or GenerationConfig()
    set_values = {name: value for name, value in given.to_dict().items() if value is not None}
    merged = GenerationConfig(**{**GenerationConfig().to_dict(), **set_values})
    merged.update(**{name: value for name, value in generation.items() if hasattr(merged, name)})
    return merged


def _check_generation(rows: Sequence[RowAttention], config: GenerationConfig, generation: dict[str, Any]) -> None:
    if config.cache_implementation is not None:
        raise RequestError(
            f"cache_implementation={config.cache_implementation!r} can't be used with residuals, capture or steering. "
            "Leave it out: the cache grows as it is needed."
        )
    if generation.get("assistant_model") is not None or config.prompt_lookup_num_tokens is not None:
        raise RequestError("assisted generation can't be used with residuals, capture or steering. Leave it out.")
    sequences = max(config.num_beams or 1, config.num_return_sequences or 1)
    captured = [number for number, row in enumerate(rows) if row.capture is not None]
    if sequences > 1 and captured:
        raise RequestError(
            f"rows {captured} capture attention, which beam search and num_return_sequences > 1 mix between sequences. "
            "Capture with greedy search or sampling of one sequence."
        )
