"""From where a server without keys may be called: by its own names, and not by pages of other sites."""

import ipaddress
from collections.abc import Iterable
from urllib.parse import urlsplit

from loraplex.server.api.api_errors import HOST_NOT_ALLOWED, ApiError
from loraplex.server.settings import NetworkSettings

_READING = ("GET", "HEAD", "OPTIONS")
_ANY = "*"


class OriginCheck:
    """Refuses what a browser sends for a page elsewhere.

    A page whose name resolves to this machine at its second look-up (DNS rebinding) is of the same origin to a browser:
    only the name, which stands in Host, gives it away. Addresses can't be rebound.
    """

    def __init__(self, network: NetworkSettings) -> None:
        self._names = {name.lower().rstrip(".") for name in (network.host, "localhost", *network.allowed_hosts)}
        bound = _address(network.host)
        self._takes_all_addresses = bound is not None and bound.is_unspecified
        self._origins = {origin.lower() for origin in network.cors_origins}

    def check(self, method: str, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Raise ApiError for a Host that isn't the server's, and for a change that a page of another origin wants."""
        known = [(name, value.decode("latin-1").strip().lower()) for name, value in headers]
        hosts = [value for name, value in known if name == b"host"]
        origins = [value for name, value in known if name == b"origin"]
        if len(hosts) > 1 or any(not self._is_own(host) for host in hosts):
            raise ApiError(
                HOST_NOT_ALLOWED,
                f"the Host {', '.join(hosts)[:200]!r} is not this server's. Call it by its address, or name it in "
                "allowed_hosts.",
            )
        if method in _READING or _ANY in self._origins:
            return
        for origin in origins:
            if origin not in self._origins and _host_of(origin) not in hosts:
                message = f"pages of {origin[:200]!r} may not call this server (cors_origins)."
                raise ApiError(HOST_NOT_ALLOWED, message)

    def _is_own(self, host: str) -> bool:
        name = _without_port(host).rstrip(".")
        if _ANY in self._names or name in self._names:
            return True
        address = _address(name)
        return address is not None and (address.is_loopback or self._takes_all_addresses)


def _host_of(origin: str) -> str:
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return ""


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if host.count(":") == 1 else host


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None
