"""The unmodified Tinker SDK and its cookbook against `loraplex serve --training`, in an environment of their own
(make test-tinker).

LORAPLEX_PYTHON names the interpreter of the server, LORAPLEX_CLIENTS_MODEL its base model.
"""

import importlib.util
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.clients.tinker.recipe_data import MODEL as NAME

if importlib.util.find_spec("tinker") is None:  # in another environment
    collect_ignore_glob = ["test_*.py"]

ROOT = Path(__file__).parents[3]
PYTHON = os.environ.get("LORAPLEX_PYTHON", str(ROOT / ".venv" / "bin" / "python"))
MODEL = os.environ.get("LORAPLEX_CLIENTS_MODEL", "smollm2-135m")
START_S = 300
os.environ |= {"TINKER_API_KEY": "tml-none", "TINKER_TELEMETRY": "0"}


class TrainingServer:
    """A server in a process of its own, which may be killed and started again at the same address."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder = folder
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        program = "from loraplex.cli.app import app; app()"
        command = [PYTHON, "-c", program, "serve", "--training", "--training-folder", str(self.folder / "runs")]
        command += ["--model", MODEL, "--dtype", "float32", "--served-name", NAME, "--port", str(self.port)]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        stop = time.monotonic() + START_S
        while not self._is_ready():
            if self.process.poll() is not None or time.monotonic() > stop:
                pytest.fail(f"the server didn't start: {(self.folder / 'log').read_text()[-3000:]}")
            time.sleep(0.2)

    def kill(self) -> None:
        assert self.process is not None, "there is no server to kill"
        self.process.kill()
        self.process.wait()

    def _is_ready(self) -> bool:
        with suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
        return False


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainingServer]:
    running = TrainingServer(tmp_path_factory.mktemp("tinker"))
    running.start()
    os.environ["TINKER_BASE_URL"] = running.url
    yield running
    if running.process is not None:
        running.process.terminate()
        running.process.wait(60)
