"""What a call of transformers' `generate` asks for, where rows ask something of attention."""

from collections.abc import Sequence
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from loraplex.errors import RequestError
from loraplex.residual.rows import RowAttention


def max_new_tokens(config: GenerationConfig, num_tokens: int) -> int:
    """How many tokens a generation may add to the prompt."""
    if config.max_new_tokens is not None:
        return int(config.max_new_tokens)
    return max(1, int(config.max_length or 20) - num_tokens)


def generation_config(base: PreTrainedModel, generation: dict[str, Any]) -> GenerationConfig:
    """transformers' defaults, the model's and the call's, as `generate` combines them."""
    given = generation.get("generation_config") or base.generation_config or GenerationConfig()
    merged = GenerationConfig(**{**GenerationConfig().to_dict(), **_set_values(given.to_dict())})
    merged.update(**{name: value for name, value in generation.items() if hasattr(merged, name)})
    return merged


def _set_values(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def check_generation(rows: Sequence[RowAttention], config: GenerationConfig, generation: dict[str, Any]) -> None:
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
