"""What one key may use at a time, and how many wrong keys an address may try."""

import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable
from enum import Enum

from loraplex.server.api.api_errors import RATE_LIMITED, ApiError
from loraplex.server.auth.keys import KeyRecord

_MINUTE_S = 60.0


class Cost(Enum):
    """What a request counts against."""

    READING = "nothing"
    CHANGING = "requests and concurrency"
    GENERATING = "requests, concurrency and tokens"


class Bucket:
    """Refills steadily; may be overdrawn by what is known only afterwards."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._size = per_minute
        self._level = float(per_minute)
        self._clock = clock
        self._updated = clock()

    def wait_s(self, amount: float) -> float:
        """How long until `amount` is there; 0 is now."""
        now = self._clock()
        self._level = min(self._size, self._level + (now - self._updated) * self._size / _MINUTE_S)
        self._updated = now
        return max(0.0, (amount - self._level) * _MINUTE_S / self._size)

    def spend(self, amount: float) -> None:
        self._level -= amount


class KeyUsage:
    """One key's buckets and running requests. Used on the event loop only."""

    def __init__(self, record: KeyRecord, clock: Callable[[], float] = time.monotonic) -> None:
        self.record = record
        self.num_running = 0
        self._requests = None if record.requests_per_minute is None else Bucket(record.requests_per_minute, clock)
        self._tokens = None if record.tokens_per_minute is None else Bucket(record.tokens_per_minute, clock)

    @property
    def counts_tokens(self) -> bool:
        """Whether tokens must be told as they are made."""
        return self._tokens is not None

    def enter(self, cost: Cost) -> None:
        """Begin a request, or raise the 429 that tells which limit it is and when to try again."""
        if cost is Cost.READING:
            return
        most = self.record.max_concurrent
        if most is not None and self.num_running >= most:
            raise ApiError(RATE_LIMITED, f"this key has {self.num_running} requests running, its limit.")
        tokens = self._tokens if cost is Cost.GENERATING else None
        for bucket, amount, what in ((self._requests, 1, "requests"), (tokens, 0.5, "tokens")):
            wait_s = 0.0 if bucket is None else bucket.wait_s(amount)
            if wait_s > 0:
                message = f"this key has used its {what} of the minute. Try again in {wait_s:.1f} seconds."
                raise ApiError(RATE_LIMITED, message, retry_after_s=wait_s)
        if self._requests is not None:
            self._requests.spend(1)
        self.num_running += 1

    def leave(self, cost: Cost) -> None:
        if cost is not Cost.READING:
            self.num_running -= 1

    def spend_tokens(self, count: int) -> None:
        if self._tokens is not None:
            self._tokens.spend(count)


class Usages:
    """The usage of every key that was seen; a key whose limits changed begins anew."""

    def __init__(self) -> None:
        self._usages: dict[str, KeyUsage] = {}

    def of(self, record: KeyRecord) -> KeyUsage:
        usage = self._usages.get(record.id)
        if usage is None or usage.record != record:
            usage = self._usages[record.id] = KeyUsage(record)
        return usage


_MAX_ADDRESSES = 10_000  # the one that tried longest ago is forgotten first


class Attempts:
    """Wrong keys by address. Used on the event loop only."""

    def __init__(self, per_minute: int) -> None:
        self._per_minute = per_minute
        self._buckets: OrderedDict[str, Bucket] = OrderedDict()

    def begin(self, address: str) -> None:
        """Count a try before it is checked, so that many at once are many. Raises ApiError for too many."""
        place = _network(address)
        bucket = self._buckets.get(place)
        if bucket is None:
            bucket = self._buckets[place] = Bucket(self._per_minute)
        self._buckets.move_to_end(place)
        while len(self._buckets) > _MAX_ADDRESSES:
            self._buckets.popitem(last=False)
        wait_s = bucket.wait_s(1)
        if wait_s > 0:
            message = f"too many wrong keys came from your address. Try again in {wait_s:.1f} seconds."
            raise ApiError(RATE_LIMITED, message, retry_after_s=wait_s)
        bucket.spend(1)

    def succeeded(self, address: str) -> None:
        """The last try was right, so it doesn't count."""
        bucket = self._buckets.get(_network(address))
        if bucket is not None:
            bucket.spend(-1)


def _network(address: str) -> str:
    """What one client holds: an IPv4 address, or the /64 of an IPv6 address."""
    try:
        known = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(known, ipaddress.IPv6Address):
        mapped = known.ipv4_mapped
        return str(mapped or ipaddress.ip_network((known, 64), strict=False))
    return str(known)
