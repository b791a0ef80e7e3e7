"""What mixtures predicted for requests that asked for it: noted while they run, kept until it is fetched."""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from loraplex.vllm_plugin.batch_rows import BatchRow, batch_rows

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


def asked_rows(runner: Any) -> Iterator[BatchRow]:
    """The rows of vLLM's first model runner whose requests asked; the second one keeps them elsewhere."""
    for row in batch_rows(runner):
        params = runner.requests[row.request_id].sampling_params
        if params is not None and (params.extra_args or {}).get(ASKED):
            yield row
