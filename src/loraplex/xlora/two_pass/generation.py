"""What transformers' `generate` is told for a batch with mixtures."""

from collections.abc import Mapping
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from loraplex.errors import RequestError
from loraplex.layers.rows.positions import changes_with_every_token
from loraplex.xlora.two_pass.two_pass import TwoPass

# Ways of generating that call the base model for something else than the batch's next tokens.
_REFUSED = ("assistant_model", "prompt_lookup_num_tokens", "custom_generate", "penalty_alpha")


def prepare_generation(two_pass: TwoPass, base: PreTrainedModel, generation: dict[str, Any]) -> None:
    """Give `generate` the cache of both passes. Raises RequestError for options that a mixture can't be run with."""
    for option in _REFUSED:
        if generation.get(option) is not None or generation_setting(base, generation, option) is not None:
            raise RequestError(
                f"{option} is set, but batches with mixtures support greedy search, sampling and beam search. Leave "
                f"{option} out for them."
            )
    implementation = generation_setting(base, generation, "cache_implementation")
    if implementation not in (None, "dynamic"):
        raise RequestError(
            f"cache_implementation is {implementation!r}, but batches with mixtures keep keys and values of two passes "
            "in a cache of their own. Leave it out."
        )
    if changes_with_every_token(base):
        generation["use_cache"] = False  # X-LoRA is defined on whole passes, which these positions can't be cached for
    elif generation_setting(base, generation, "use_cache") is not False and generation.get("past_key_values") is None:
        generation["past_key_values"] = two_pass.new_cache()


def generation_setting(base: PreTrainedModel, generation: Mapping[str, Any], option: str) -> Any:
    """An option as `generate` will read it: the call's, its generation_config's, or the model's."""
    if option in generation:
        return generation[option]
    config = generation.get("generation_config") or base.generation_config or GenerationConfig()
    return getattr(config, option, None)
