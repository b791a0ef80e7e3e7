"""Beside each trained LoRA, what its prompts look like to the base model: by that `adapters="auto"` chooses it."""

import logging
from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loraplex.adapters.prompt_centroid import write_centroid
from loraplex.errors import UnsupportedAdapterError
from loraplex.models.auto.prompt_states import MAX_PROMPTS, background_tokens, fit_centroids
from loraplex.training.adapters.job_state import JobState
from loraplex.training.core.results import TrainResult
from loraplex.training.data.examples import Example

logger = logging.getLogger(__name__)


def write_centroids(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    states: Sequence[JobState],
    results: Sequence[TrainResult],
) -> None:
    """Write a prompt centroid into each finished LoRA's folder; none for one whose records have no prompts.

    Raises OutputError.
    """
    rows: dict[str, list[Sequence[int]]] = {}
    by_name = {result.name: result for result in results if result.finished != "diverged"}
    for state in states:
        prompts = _prompts(state.data.train) if state.job.lora is not None and state.name in by_name else []
        if prompts:
            rows[state.name] = prompts
    if not rows:
        return
    try:
        centroids = fit_centroids(base, rows, background_tokens(tokenizer))
    except UnsupportedAdapterError as error:
        logger.info("no prompt centroids are written: %s", error)
        return
    for name, centroid in centroids.items():
        write_centroid(centroid, by_name[name].folder)


def _prompts(examples: Sequence[Example]) -> list[Sequence[int]]:
    """The tokens before the first answer of some examples, evenly spread; texts without a prompt have none."""
    asked = [example for example in examples if example.answer[0] > 1]
    chosen = asked[:: max(1, len(asked) // MAX_PROMPTS)][:MAX_PROMPTS]
    return [example.ids[: example.answer[0]] for example in chosen]
