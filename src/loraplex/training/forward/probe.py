"""What training relies on in a base model, tried out on a few tokens."""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from loraplex.errors import BaseModelError, ConfigError
from loraplex.layers.quantized.training import check_gradients
from loraplex.training.data.examples import Example
from loraplex.training.forward.batch import (
    PrefixGroup,
    TrainingRow,
    TrainingSlot,
    TrainingWeightProvider,
    make_batch,
)
from loraplex.training.forward.loss import token_losses
from loraplex.training.forward.packed_rows import make_pack
from loraplex.training.forward.prefix import SharedPrefixes

logger = logging.getLogger(__name__)

_LONG, _SHORT = (1, 5, 3, 7, 2, 6), (4, 3, 6, 2)  # ids that every vocabulary has
_PREFIXES: dict[PrefixGroup, int] = {(0, 1.0): 3, (1, 1.0): 1}
_FAILURES = (TypeError, ValueError, IndexError, KeyError, AttributeError, RuntimeError, NotImplementedError)


def check_trainable_base(base: PreTrainedModel) -> None:
    """Raise BaseModelError unless `base` is a causal language model: a token's prediction sees nothing after it.

    Also for quantized weights that no gradient flows through.
    """
    name = type(base).__name__
    if base.dtype == torch.float16:
        raise BaseModelError(
            f"{name} is in float16, in which small gradients vanish and large ones overflow. Load it with "
            "dtype='bfloat16' or 'float32'."
        )
    advice = "Adapters are trained on causal language models, such as LlamaForCausalLM."
    if getattr(base.config, "is_encoder_decoder", False) or base.get_output_embeddings() is None:
        raise BaseModelError(f"{name} has no output layer of a causal language model. {advice}")
    check_gradients(base)
    whole = _losses(base, [_example(_LONG, answer=(3,))])
    with_later_tokens = _losses(base, [_example(_LONG, answer=(3, 5))])
    if not _close(whole, with_later_tokens[:1], base.dtype):
        raise BaseModelError(f"{name} lets a token see what follows it, so it can't learn to predict. {advice}")


def check_length(label: str, max_length: int, base: PreTrainedModel) -> None:
    """Raise ConfigError, which starts with `label`, for records longer than the base model's positions."""
    longest = getattr(base.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if longest is not None and max_length > longest:
        raise ConfigError(f"{label}: max_length is {max_length}, but the base model has {longest} positions. Lower it.")


def can_share_prefixes(base: PreTrainedModel) -> bool:
    """Whether `base` continues exactly from cached keys and values, with prefixes of different lengths in one batch.

    A cache that forgets (sliding windows) or mixes tokens (recurrent states) is ruled out by its class.
    """
    name = type(base).__name__
    examples = [_example(_LONG, answer=(4, 5)), _example(_SHORT, answer=(2, 3))]
    try:
        with torch.no_grad():
            cache = base.base_model(input_ids=torch.tensor([_SHORT], device=base.device), use_cache=True)
            cache = cache.past_key_values
        if not isinstance(cache, DynamicCache) or {type(layer) for layer in cache.layers} != {DynamicLayer}:
            logger.info("prefixes are not shared: the cache of %s does not keep every token", name)
            return False
        same = _close(_losses(base, examples), _losses(base, examples, prefixes=_PREFIXES), base.dtype)
    except _FAILURES as error:
        logger.info("prefixes are not shared: %s can't continue from a cache: %s", name, error)
        return False
    if not same:
        logger.info("prefixes are not shared: %s computes otherwise from a cache", name)
    return same


def check_packing(base: PreTrainedModel) -> None:
    """Raise ConfigError unless packed rows have the losses that they have apart, tried on a few tokens."""
    name, advice = type(base).__name__, "Set packing=False."
    examples = [_example(_LONG, answer=(4, 5)), _example(_SHORT, answer=(2, 3)), _example(_LONG[::-1], answer=(1, 3))]
    if not can_share_prefixes(base):
        raise ConfigError(f"packing is on, but a token of {name} knows more of earlier ones than keys. {advice}")
    rows = [TrainingRow(job, job, example) for job, example in enumerate(examples)]
    bank = TrainingWeightProvider([TrainingSlot({}) for _ in examples])
    with torch.no_grad():
        pack = make_pack(rows, _PREFIXES, base.device, base.dtype)
        try:
            packed = token_losses(base, pack, bank, None)
        except _FAILURES as error:
            raise ConfigError(f"packing is on, but {name} can't run packed rows: {error}. {advice}") from error
    if not _close(_losses(base, examples), packed, base.dtype):
        raise ConfigError(f"packing is on, but {name} computes otherwise where rows are packed. {advice}")


def _example(ids: Sequence[int], answer: tuple[int, ...]) -> Example:
    return Example(tuple(ids[: answer[-1] + 1]), answer, "probe")


@torch.no_grad()
def _losses(
    base: PreTrainedModel, examples: Sequence[Example], prefixes: dict[PrefixGroup, int] | None = None
) -> Tensor:
    bank = TrainingWeightProvider([TrainingSlot({}) for _ in examples])
    rows = [TrainingRow(job, job, example) for job, example in enumerate(examples)]
    shared = None if prefixes is None else SharedPrefixes(base, rows, prefixes, bank)
    return token_losses(base, make_batch(rows, prefixes or {}, base.device), bank, shared)


def _close(losses: Tensor, others: Tensor, dtype: torch.dtype) -> bool:
    tolerance = 1e-3 if dtype in (torch.float32, torch.float64) else 5e-2
    return torch.allclose(losses, others, rtol=tolerance, atol=tolerance)
