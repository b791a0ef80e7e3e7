"""A server in a process of its own: python -m tests.server.serve_tiny ROOT DRAIN_S [KEYS_FILE].

Without arguments, one such process after another: a line with their JSON for each, and a line for each that ended. They
are forked by a process that has imported everything, which takes longer than all that a server does in a test.
"""

import json
import os
import sys
import time
from pathlib import Path

from loraplex.engine.engine import Engine
from loraplex.server.auth.keys import KeyFile
from loraplex.server.lifecycle import Server, run_server
from loraplex.server.logs import set_up_logs

_STEP_S = 0.1  # the tiny model must not be done before the signal


def main(root: str, drain_s: str, keys_file: str = "", *, drain_step_s: float = _STEP_S) -> None:
    step, servers = Engine.step, []

    def slow_step(engine: Engine):
        is_draining = bool(servers) and servers[0].state.is_draining
        time.sleep(drain_step_s if is_draining else _STEP_S)
        return step(engine)

    def tell(server: Server) -> None:
        servers.append(server)
        print(server.port, flush=True)

    Engine.step = slow_step
    set_up_logs("info")  # first: what the tests' packages log when they are imported is logged like anything else
    from tests.server.tiny_server import make_model, settings

    keys = KeyFile(keys_file) if keys_file else None
    config = settings(keys=keys, roots=(root,), drain_s=float(drain_s))
    run_server(make_model(Path(root)), config, on_ready=tell)


def fork_each() -> None:
    """Print the process id of each server, the port that it tells, and its status when it has ended."""
    import tests.server.tiny_server  # noqa: F401

    for line in sys.stdin:
        process = os.fork()
        if not process:
            print(os.getpid(), flush=True)
            main(**json.loads(line))
            os._exit(0)
        _, status = os.waitpid(process, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:]) if sys.argv[1:] else fork_each()
