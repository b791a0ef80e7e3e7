"""Ray's services on one machine stay on that machine."""

import os
from typing import Any

_CLUSTERS = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


def is_one_machine() -> bool:
    """Whether Ray is started here, instead of joined at RAY_ADDRESS."""
    return not os.environ.get("RAY_ADDRESS")


def choose_loopback() -> None:
    """Ray's switch for clusters of several machines: off, its services bind to the loopback address.

    Ray reads it when it is imported, here and in the processes that it starts.
    """
    os.environ[_CLUSTERS] = "0"


def bind_replica_to_loopback() -> None:
    """For a replica's process: Ray Serve 2.60 opens a server for calls between replicas on all addresses.

    Such calls are pickles, which whoever reaches the port could make up. There is no setting for it, so the function
    that binds it is wrapped; a Ray that has none by that name is an AttributeError, and the replica doesn't start.
    """
    from ray.serve._private import replica

    bind = replica.add_port_to_grpc_server

    def bind_locally(server: Any, address: str) -> Any:
        return bind(server, f"127.0.0.1:{address.rsplit(':', 1)[1]}")

    replica.add_port_to_grpc_server = bind_locally
