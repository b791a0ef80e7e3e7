"""Whether an adapter is low-rank factors and nothing else, for those who can do nothing with the rest."""

from collections.abc import Collection
from dataclasses import MISSING, Field, fields
from typing import Any

import torch

from loraplex.adapters.weights import Adapter
from loraplex.errors import UnsupportedAdapterError
from loraplex.validation import listed

_OF_ADAPTER = frozenset({"config", "layers", "places", "end_tokens"})
_OF_WEIGHTS = frozenset({"kind", "lora_a", "lora_b", "scaling", "magnitude"})
_OF_CONFIG = frozenset(
    {
        *("r", "lora_alpha", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_dropout", "fan_in_fan_out"),
        *("alora_invocation_tokens", "base_model_name_or_path", "task_type"),
    }
)
_KINDS = ("linear", "embedding")


def require_factors_alone(name: str, adapter: Adapter, what: str, *, dora: bool) -> None:
    """Raise UnsupportedAdapterError where `what` ("merged into weights") would lose a part of the adapter.

    What is known by name (aLoRA, DoRA unless `dora`) gets its reason; any other part that an adapter may carry and
    that isn't at its default is refused under the name it has in `Adapter`, `LoraWeights` or `LoraConfig`.
    """
    config = adapter.config
    if config.alora_invocation_tokens is not None:
        raise UnsupportedAdapterError(
            f"adapter {name!r} can't be {what}: it is an aLoRA (alora_invocation_tokens), which is off for the tokens "
            "before its invocation, and weights are the same for all tokens. Serve it with the base model instead."
        )
    if config.use_dora and not dora:
        raise UnsupportedAdapterError(
            f"adapter {name!r} can't be {what}: it is a DoRA (use_dora), whose magnitudes belong to the base model's "
            "weights and its own factors together. Merge it into the base model (loraplex merge), or serve the link."
        )
    parts = _set_fields(adapter, _OF_ADAPTER) | _set_fields(config, _OF_CONFIG)
    if "contents" in parts:
        parts = (parts - {"contents"}) | _set_fields(config.contents, ())
    for weights in adapter.layers.values():
        parts |= _set_fields(weights, _OF_WEIGHTS)
        if weights.kind not in _KINDS:
            parts.add(f"kind {weights.kind!r}")
    if parts:
        raise UnsupportedAdapterError(
            f"adapter {name!r} can't be {what}: it carries more than the factors of linear and embedding modules: "
            f"{listed(parts)}. Serve it with the base model instead."
        )


def _set_fields(owner: Any, known: Collection[str]) -> set[str]:
    """The names of a dataclass's fields that aren't known and not at their defaults."""
    others = [part for part in fields(owner) if part.name not in known]
    return {part.name for part in others if not _is_default(getattr(owner, part.name), part)}


def _is_default(value: Any, part: Field[Any]) -> bool:
    default = part.default if part.default_factory is MISSING else part.default_factory()
    return value is default or (not isinstance(value, torch.Tensor) and bool(value == default))
