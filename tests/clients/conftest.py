"""Clients of other projects against `loraplex serve`, in an environment of their own (make test-clients).

The server runs in the environment of loraplex: LORAPLEX_PYTHON names its interpreter. One serves all tests, with the
model that LORAPLEX_CLIENTS_MODEL names.
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
from tempfile import TemporaryFile

import pytest

if importlib.util.find_spec("litellm") is None:  # in loraplex's own environment
    collect_ignore_glob = ["test_*.py"]
else:  # telemetry of the clients, before any of them is imported
    os.environ |= {
        "ANONYMIZED_TELEMETRY": "False",
        "DO_NOT_TRACK": "1",
        "LANGCHAIN_TRACING_V2": "false",
        "LANGSMITH_TRACING": "false",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "OPENAI_AGENTS_DISABLE_TRACING": "1",
        "OTEL_SDK_DISABLED": "true",
        "LOGFIRE_SEND_TO_LOGFIRE": "false",
    }

ROOT = Path(__file__).parent.parent.parent
PYTHON = os.environ.get("LORAPLEX_PYTHON", str(ROOT / ".venv" / "bin" / "python"))
MODEL = os.environ.get("LORAPLEX_CLIENTS_MODEL", "smollm2-135m")
NAME = "smollm2-135m"
START_S = 300


@pytest.fixture(scope="session")
def url() -> Iterator[str]:
    """The address of the server's API."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = "from loraplex.cli.app import app; app()"
    command = [PYTHON, "-c", program, "serve", "--model", MODEL, "--served-name", NAME, "--port", str(port)]
    with TemporaryFile() as log:
        server = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        try:
            stop = time.monotonic() + START_S
            while not _is_ready(port):
                if server.poll() is not None or time.monotonic() > stop:
                    log.seek(0)
                    pytest.fail(f"the server didn't start: {log.read().decode()[-3000:]}")
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()
            server.wait(60)


def _is_ready(port: int) -> bool:
    with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
        return bool(answer.status == 200)
    return False
