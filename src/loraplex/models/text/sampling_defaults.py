"""What a request that says nothing is sampled with: the base model's generation_config, as vLLM reads it."""

from collections.abc import Mapping
from types import MappingProxyType

from transformers import PreTrainedModel

from loraplex.errors import ConfigError

TEMPERATURE = 1.0  # of models whose generation_config has none
OPTIONS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
SOURCES = ("auto", "none")


def sampling_defaults(base: PreTrainedModel, source: str = "auto") -> Mapping[str, float | int]:
    """The options that the model's generation_config sets; `source` "none": the temperature alone, 1.

    As in vLLM, `do_sample` doesn't count: a temperature of 0 is greedy. Raises ConfigError for an unknown source.
    """
    if source not in SOURCES:
        raise ConfigError(f"generation_config is {source!r}; it must be one of {', '.join(SOURCES)}.")
    found: dict[str, float | int] = {"temperature": TEMPERATURE}
    config = base.generation_config if source == "auto" else None
    if config is not None:
        own = config.to_diff_dict()
        found |= {name: own[name] for name in OPTIONS if isinstance(own.get(name), int | float)}
    return MappingProxyType(found)
