"""What requests captured of attention: collected while they run, kept until it is fetched."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from loraplex.residual.capture import CaptureBuffer

MAX_BYTES = 2**26  # kept; the requests that came first go first


@dataclass
class _Kept:
    buffer: CaptureBuffer
    num_fed: int = 0  # tokens


class CaptureLog:
    """The captures of requests by vLLM's request id, up to MAX_BYTES."""

    def __init__(self) -> None:
        self._requests: OrderedDict[str, _Kept] = OrderedDict()

    def add(self, request_id: str, buffer: CaptureBuffer) -> None:
        """Begin a request's capture."""
        self._requests[request_id] = _Kept(buffer)
        while len(self._requests) > 1 and sum(kept.buffer.num_bytes for kept in self._requests.values()) > MAX_BYTES:
            self._requests.popitem(last=False)

    def buffer(self, request_id: str) -> CaptureBuffer | None:
        """Where a request's weights go; None of one that captures nothing, was fetched, or had to go for newer ones."""
        kept = self._requests.get(request_id)
        return None if kept is None else kept.buffer

    def feed(self, request_id: str, num_fed: int) -> None:
        """Tell how many tokens of a request have run."""
        kept = self._requests.get(request_id)
        if kept is not None:
            kept.num_fed = max(kept.num_fed, num_fed)

    def take(self, request_id: str) -> list[dict[str, Any]]:
        """The captures of a request, which are then forgotten; of all its prompts, in the order of ids.

        vLLM adds to the id that its API shows: "-0" for the first prompt, and a random end.
        """
        found = sorted(known for known in self._requests if known == request_id or known.startswith(f"{request_id}-"))
        return [{"request_id": known, **_as_json(self._requests.pop(known))} for known in found]


def _as_json(kept: _Kept) -> dict[str, Any]:
    """Weights [layers][heads][queries][keys]; one head where the mean of heads was asked for."""
    capture = kept.buffer.result(range(kept.num_fed), ())
    return {
        "layers": list(capture.layers),
        "heads": None if capture.heads is None else list(capture.heads),
        "query_positions": list(capture.query_positions),
        "weights": capture.weights.tolist(),
    }
