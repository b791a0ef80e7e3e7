"""A server in a process of its own: python -m tests.server.serve_tiny ROOT DRAIN_S [KEYS_FILE]."""

import sys
import time
from pathlib import Path

from loraplex.engine.engine import Engine
from loraplex.server.auth.keys import KeyFile
from loraplex.server.lifecycle import run_server
from loraplex.server.logs import set_up_logs

_STEP_S = 0.1  # the tiny model must not be done before the signal


def main(root: str, drain_s: str, keys_file: str = "") -> None:
    step = Engine.step

    def slow_step(engine: Engine):
        time.sleep(_STEP_S)
        return step(engine)

    Engine.step = slow_step
    set_up_logs("info")  # first: what the tests' packages log when they are imported is logged like anything else
    from tests.server.tiny_server import make_model, settings

    keys = KeyFile(keys_file) if keys_file else None
    config = settings(keys=keys, roots=(root,), drain_s=float(drain_s))
    run_server(make_model(Path(root)), config, on_ready=lambda server: print(server.port, flush=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
