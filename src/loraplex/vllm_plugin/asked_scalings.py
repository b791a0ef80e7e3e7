"""Which requests of the batch that runs asked for their scalings, and where their tokens are."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from loraplex.vllm_plugin.scalings_log import ASKED


@dataclass(frozen=True)
class ScalingsRequest:
    """One request in the batch."""

    request_id: str
    tokens: slice  # in the batch
    first_position: int  # of these tokens in the sequence


def asked_rows(runner: Any) -> Iterator[ScalingsRequest]:
    """The rows of vLLM's first model runner whose requests asked; the second one keeps them elsewhere."""
    if not hasattr(runner, "input_batch"):
        return
    batch, starts = runner.input_batch, runner.query_start_loc.np
    for row, request_id in enumerate(batch.req_ids):
        params = runner.requests[request_id].sampling_params
        if params is None or not (params.extra_args or {}).get(ASKED):
            continue
        tokens = slice(int(starts[row]), int(starts[row + 1]))
        yield ScalingsRequest(request_id, tokens, int(batch.num_computed_tokens_cpu[row]))
