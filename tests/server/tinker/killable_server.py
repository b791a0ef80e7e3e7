"""A training server on a tiny model, to be killed and started again: python -m tests.server.tinker.killable_server DIR.

Each line of its input is a port, on which a process of its own serves from then on, whose id is printed at once.
"""

import os
import signal
import sys
from dataclasses import replace

from loraplex.server.lifecycle import run_server
from loraplex.server.settings import NetworkSettings, TrainingSettings
from tests.server.tinker.test_tinker_api import model
from tests.server.tiny_server import settings


def main(folder: str) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that were killed
    for line in sys.stdin:
        child = os.fork()  # what is imported already needs no second time
        if child == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            serve(folder, int(line))
            os._exit(0)
        print(child, flush=True)


def serve(folder: str, port: int) -> None:
    config = replace(
        settings(),
        network=NetworkSettings(port=port),
        training=TrainingSettings(training=True, training_folder=folder, training_snapshot_steps=4),
    )
    run_server(model(), config)


if __name__ == "__main__":
    main(*sys.argv[1:])
