"""How many columns the rows of a pass have, for what begins at one of them (an aLoRA)."""

from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from loraplex.routing.routing import current_routing

_CACHES = ("past_key_values", "cache_params", "state", "mems", "past_buckets_states")


def attach_pass_length(base: PreTrainedModel) -> list[RemovableHandle]:
    """Tell the current routing of each call of the base model how long its rows are, and keep its gates behind it."""

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        routing = current_routing()
        if routing is None or not (routing.has_starts or routing.gate_log is not None):
            return
        num_new, length = pass_length(args, kwargs)
        if routing.gate_log is not None:
            routing.gate_log.begin_pass(num_new, length)
        if routing.has_starts:
            routing.begin_pass(num_new, length)

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        routing = current_routing()
        if routing is not None and routing.gate_log is not None:
            routing.keep_gates()

    # In front of what changes the call's inputs (the two passes of mixtures).
    return [
        base.register_forward_pre_hook(before, with_kwargs=True, prepend=True),
        base.register_forward_hook(after),
    ]


def pass_length(args: tuple[Any, ...], inputs: dict[str, Any]) -> tuple[int, int | None]:
    """The new columns of a row, and those with what is in the cache; None where the cache doesn't tell."""
    tokens = inputs.get("input_ids")
    if tokens is None:
        tokens = inputs.get("inputs_embeds")
    if tokens is None and args:
        tokens = args[0]
    if not isinstance(tokens, Tensor):
        return 0, None
    num_new, mask = int(tokens.shape[1]), inputs.get("attention_mask")
    if all(inputs.get(name) is None for name in _CACHES):
        return num_new, num_new
    num_past = cached_length(inputs.get("past_key_values"))
    if num_past is not None:
        return num_new, num_past + num_new
    if isinstance(mask, Tensor) and mask.ndim == 2:  # of all tokens, where `generate` passes one
        return num_new, int(mask.shape[1])
    return num_new, None


def cached_length(cache: Any) -> int | None:
    """How many tokens are in a cache; None where it doesn't say.

    A layer that keeps a recurrent state may call itself empty, so that the longest layer counts.
    """
    lengths = [_length(part) for part in (cache, *(getattr(cache, "layers", None) or ()))]
    return max((length for length in lengths if length is not None), default=None)


def _length(cache: Any) -> int | None:
    try:
        return int(cache.get_seq_length())
    except (AttributeError, TypeError, ValueError, NotImplementedError, IndexError):
        return None
