"""Fair sharing: requests with the same adapters have one share, and the share that got least goes first."""

from collections import Counter

Share = tuple[str, ...]


class FairShares:
    """Tokens that each share has got, while it has requests (start-time fair queueing, as virtual time).

    A share that comes back after a pause starts where the least served one stands: waiting saves up no credit.
    """

    def __init__(self) -> None:
        self._served: dict[Share, float] = {}
        self._num_requests: Counter[Share] = Counter()

    def enter(self, share: Share) -> None:
        """One more request of a share."""
        if self._num_requests[share] == 0:
            floor = min(self._served.values(), default=0.0)
            self._served[share] = floor
        self._num_requests[share] += 1

    def leave(self, share: Share) -> None:
        """One request less."""
        self._num_requests[share] -= 1
        if self._num_requests[share] == 0:
            del self._num_requests[share], self._served[share]

    def charge(self, share: Share, num_tokens: int) -> None:
        """Count computed tokens."""
        if share in self._served:
            self._served[share] += num_tokens

    def served(self, share: Share) -> float:
        return self._served.get(share, 0.0)
