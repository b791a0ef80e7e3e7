"""How many wrong keys an address may try."""

import ipaddress
from collections import OrderedDict

from loraplex.server.api.api_errors import RATE_LIMITED, ApiError
from loraplex.server.auth.rate_limit import Bucket

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
