"""Two replicas behind one address, in processes of their own: python -m tests.server.serve_replicas ROOT."""

import sys

from loraplex.server.replicas.cluster import run_replicas
from loraplex.server.settings import LogSettings, ModelSettings, NetworkSettings, ServeConfig
from tests.server import replica_models
from tests.server.tiny_server import ENGINE


def main(root: str) -> None:
    config = ServeConfig(
        model=ModelSettings(model=root, served_name="tiny"),
        network=NetworkSettings(port=0, drain_s=10),
        logs=LogSettings(log_requests=False),
        engine=ENGINE,
    )
    run_replicas(config, 2, load=replica_models.load, on_ready=lambda server: print("PORT", server.port, flush=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
