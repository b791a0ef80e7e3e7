"""A server without keys, shared by tests that leave it as they found it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.tiny_server import Running, make_model, running, settings, write_adapters


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapters(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[Running]:
    with running(make_model(root), settings(roots=(str(root),))) as server:
        yield server
