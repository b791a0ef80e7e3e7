"""The address that a server listens on: whether it is free, and how clients write it."""

import errno
import socket

from loraplex.errors import ConfigError
from loraplex.server.settings import NetworkSettings


def check_address(network: NetworkSettings) -> None:
    """Raise ConfigError for an address that can't be listened on, before anything that takes long is done.

    What another process takes in between is found when the server starts to listen.
    """
    if network.port == 0:
        return
    try:
        found = socket.getaddrinfo(network.host, network.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"host is {network.host!r}, which is no address of this machine: {error}.") from error
    for family, kind, protocol, _, address in dict.fromkeys(found):
        try:
            _try(family, kind, protocol, address)
        except OSError as error:
            raise ConfigError(_told(network, error)) from error


def _try(family: int, kind: int, protocol: int, address: object) -> None:
    """Bind as asyncio's servers do, and let go."""
    with socket.socket(family, kind, protocol) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            trial.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        trial.bind(address)  # type: ignore[arg-type]


def _told(network: NetworkSettings, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return (
            f"port {network.port} of {network.host!r} is in use by another process. End that, or choose another one "
            "with --port (0 is any free one)."
        )
    if error.errno == errno.EACCES:
        return f"port {network.port} may not be used by this user. Choose one above 1023 with --port."
    return f"{network.host!r}, port {network.port}, can't be listened on: {error.strerror}. Correct --host and --port."


def url_of(network: NetworkSettings, port: int) -> str:
    """Where clients reach a server; one that listens on all addresses, by a loopback address."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(network.host, network.host)
    scheme = "https" if network.tls_certificate else "http"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
