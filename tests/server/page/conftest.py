"""A browser, and tabs of it that show the page of a server."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from playwright.sync_api import expect

from tests.server.page.browser import TIMEOUT_MS, browsing
from tests.server.page.driver import set_up
from tests.server.tiny_server import Running


@pytest.fixture(scope="module")
def context() -> Iterator[Any]:
    expect.set_options(timeout=TIMEOUT_MS)
    with browsing(viewport={"width": 1280, "height": 800}) as context:
        yield context


@pytest.fixture
def page(context: Any, server: Running) -> Iterator[Any]:
    """A tab of its own, which must not have complained about anything in the end; texts are shown as they are."""
    with tab(context, server) as opened:
        yield opened


@contextmanager
def tab(context: Any, server: Running) -> Iterator[Any]:
    """A tab with a server's page, greedy, with short answers."""
    opened = context.new_page()
    complaints: list[str] = []
    requests: list[str] = []
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("console", lambda message: "Content Security" in message.text and complaints.append(message.text))
    opened.on("request", lambda request: requests.append(request.url))
    opened.goto(server.url)
    set_up(opened)
    yield opened
    opened.close()
    assert not complaints
    assert all(url.startswith(server.url) for url in requests), "the page asks its own server only"
