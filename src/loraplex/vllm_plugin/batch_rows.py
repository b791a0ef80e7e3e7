"""The requests of the batch that runs next, as vLLM's first model runner knows them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class BatchRow:
    """One request's tokens in the batch."""

    request_id: str
    tokens: slice
    first_position: int  # of these tokens in the sequence
    num_prompt: int


def batch_rows(runner: Any) -> Iterator[BatchRow]:
    """The rows of the batch; none of vLLM's second model runner, which keeps them elsewhere."""
    if not hasattr(runner, "input_batch"):
        return
    batch, starts = runner.input_batch, runner.query_start_loc.np
    for row, request_id in enumerate(batch.req_ids):
        tokens = slice(int(starts[row]), int(starts[row + 1]))
        yield BatchRow(request_id, tokens, int(batch.num_computed_tokens_cpu[row]), int(batch.num_prompt_tokens[row]))
