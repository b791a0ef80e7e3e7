"""The rows that ask for `auto`: what prompts teach of adapters, and what each row's prompt stands for."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loraplex.errors import RequestError
from loraplex.models.auto.prompt_states import (
    MAX_PROMPTS,
    Prompt,
    background_tokens,
    fit_centroids,
    prompt_tokens,
    row_states,
)
from loraplex.models.auto.selection import DEFAULT_FLOOR, AutoChoice, Candidates, check_floor
from loraplex.models.registry import Registry
from loraplex.routing.adapter_spec import AdapterSpec, is_auto


def learn_prompts(
    base: PreTrainedModel,
    registry: Registry,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Mapping[str, Sequence[Prompt]],  # by the name that they are for
    *,
    chat: bool,
    save: bool,
) -> None:
    """Let `auto` choose each of the names, for prompts like these of it; raises as `MultiLoraModel.fit_auto`."""
    for name in prompts:
        registry.check_choosable(name)
    rows = {
        name: [prompt_tokens(tokenizer, prompt, chat=chat) for prompt in own[:MAX_PROMPTS]]
        for name, own in prompts.items()
    }
    for name, centroid in fit_centroids(base, rows, background_tokens(tokenizer)).items():
        registry.set_centroid(name, centroid, save=save)


def choose_rows(
    base: PreTrainedModel,
    registry: Registry,
    input_ids: Tensor,  # [rows, tokens]
    attention_mask: Tensor | None,
    *,
    candidates: Candidates = Candidates(),  # noqa: B008 (it is frozen)
    floor: float = DEFAULT_FLOOR,
) -> list[AutoChoice]:
    """What each prompt chooses; raises as `MultiLoraModel.choose_adapters`."""
    check_floor(floor)
    registry.auto.check(candidates)
    hidden = row_states(base, input_ids, attention_mask)
    return [registry.auto.choose(own, candidates, floor) for own in hidden]


def chosen_specs(
    base: PreTrainedModel,
    registry: Registry,
    adapters: Sequence[AdapterSpec] | None,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    inputs: Mapping[str, Any],
) -> Sequence[AdapterSpec] | None:
    """The adapters of a call's rows, those of `auto` chosen. Raises RequestError for prompts that aren't whole."""
    if adapters is None or isinstance(adapters, str) or not any(map(is_auto, adapters)):
        return adapters
    rows = [row for row, spec in enumerate(adapters) if is_auto(spec)]
    if input_ids is None or len(adapters) != len(input_ids) or inputs.get("past_key_values") is not None:
        raise RequestError(
            "adapters='auto' reads the row's whole prompt in input_ids, one for each entry of adapters and without "
            "past_key_values. Use choose_adapters with the prompt, and name what it chose."
        )
    mask = None if attention_mask is None else attention_mask[rows]
    choices = iter(choose_rows(base, registry, input_ids[rows], mask))
    return [next(choices).name if is_auto(spec) else spec for spec in adapters]
