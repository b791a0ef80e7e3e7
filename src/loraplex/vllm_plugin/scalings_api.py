"""What mixtures predicted for requests that asked for it: noted while they run, kept until it is fetched."""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

ASKED = "loraplex_scalings"  # a request's extra argument (`vllm_xargs` in the OpenAI API)
MAX_BYTES = 2**26  # kept; the requests that were asked longest ago go first


@dataclass
class RequestScalings:
    """The scalings of one request's tokens, by mixture and position; a preempted row's are predicted once more."""

    by_mixture: dict[str, dict[int, Tensor]] = field(default_factory=dict)  # position -> [layers, experts]
    num_bytes: int = 0

    def add(self, mixture: str, first_position: int, scalings: Tensor) -> None:  # [tokens, layers, experts]
        rows = self.by_mixture.setdefault(mixture, {})
        for i, row in enumerate(scalings):
            if first_position + i not in rows:
                self.num_bytes += row.numel() * row.element_size()
            rows[first_position + i] = row

    def as_json(self) -> list[dict[str, Any]]:
        """By mixture, the positions that were computed (those from the prefix cache were not) and their scalings."""
        return [
            {
                "mixture": mixture,
                "positions": sorted(rows),
                "scalings": torch.stack([rows[position] for position in sorted(rows)]).tolist(),
            }
            for mixture, rows in self.by_mixture.items()
        ]


class RequestScalingsLog:
    """Keeps the scalings of requests by vLLM's request id, up to MAX_BYTES."""

    def __init__(self) -> None:
        self._requests: OrderedDict[str, RequestScalings] = OrderedDict()

    def add(self, request_id: str, mixture: str, first_position: int, scalings: Tensor) -> None:
        """Note what a head predicted for consecutive tokens, [tokens, layers, experts]."""
        self._requests.setdefault(request_id, RequestScalings()).add(mixture, first_position, scalings.cpu())
        while len(self._requests) > 1 and self._num_bytes() > MAX_BYTES:
            self._requests.popitem(last=False)

    def take(self, request_id: str) -> list[dict[str, Any]]:
        """The scalings of a request, which are then forgotten; of all its prompts and choices, in the order of ids.

        vLLM adds to the id that its API shows: "-0" for the first prompt, and a random end.
        """
        found = sorted(known for known in self._requests if known == request_id or known.startswith(f"{request_id}-"))
        return [{"request_id": known, "mixtures": self._requests.pop(known).as_json()} for known in found]

    def _num_bytes(self) -> int:
        return sum(request.num_bytes for request in self._requests.values())


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


EXTENSION = "loraplex.vllm_plugin.scalings_api.ScalingsExtension"


class ScalingsExtension:
    """vLLM makes its worker class a subclass of this one (`worker_extension_cls`)."""

    model_runner: Any

    def loraplex_scalings(self, request_id: str) -> list[dict[str, Any]]:
        """What mixtures predicted for a request that asked for it; empty if there is nothing. Each is given once."""
        scaling_pass = getattr(self.model_runner, "loraplex_scaling_pass", None)
        return [] if scaling_pass is None else scaling_pass.log.take(request_id)
