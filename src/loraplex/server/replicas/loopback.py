"""Ray's services on one machine stay on that machine."""

import os
from importlib import import_module
from importlib.metadata import version
from typing import Any

from loraplex.errors import ConfigError

KNOWN = "ray[serve]>=2.60,<2.61"
_MODULE, _BIND = "ray.serve._private.replica", "add_port_to_grpc_server"
_CLUSTERS = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


def is_one_machine() -> bool:
    """Whether Ray is started here, instead of joined at RAY_ADDRESS."""
    return not os.environ.get("RAY_ADDRESS")


def choose_loopback() -> None:
    """Ray's switch for clusters of several machines: off, its services bind to the loopback address.

    Ray reads it when it is imported, here and in the processes that it starts.
    """
    os.environ[_CLUSTERS] = "0"


def check_loopback() -> None:
    """Raises ConfigError where the installed Ray Serve can't be kept on this machine: before anything is started."""
    if not callable(getattr(_module(), _BIND, None)):
        raise ConfigError(
            f"Ray {version('ray')} has moved {_MODULE}.{_BIND}, which keeps a port that takes pickles on this machine. "
            f"Install the version that loraplex knows, pip install {KNOWN!r}, or set --no-replica-loopback: then "
            "whoever reaches this machine's ports can run code in the replicas, unless a firewall keeps them out."
        )


def bind_replica_to_loopback() -> None:
    """For a replica's process: Ray Serve 2.60 opens a server for calls between replicas on all addresses.

    Such calls are pickles, which whoever reaches the port could make up. There is no setting for it, so the function
    that binds it is wrapped. Raises ConfigError as `check_loopback` does.
    """
    check_loopback()
    replica = _module()
    bind = getattr(replica, _BIND)

    def bind_locally(server: Any, address: str) -> Any:
        return bind(server, f"127.0.0.1:{address.rsplit(':', 1)[1]}")

    setattr(replica, _BIND, bind_locally)


def _module() -> Any:
    try:
        return import_module(_MODULE)
    except ModuleNotFoundError as error:
        if error.name == "ray":
            raise
        return None
