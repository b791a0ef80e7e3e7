"""A headless Chromium that the system has; playwright's own browsers are not used."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.parts import find_browser, require

_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
TIMEOUT_MS = 60_000


def chromium() -> str:
    """The browser's path; skips the test without one."""
    require("chromium")
    return str(find_browser())


@contextmanager
def browsing(**options: Any) -> Iterator[Any]:
    """Playwright's context of a browser with a profile of its own."""
    from playwright.sync_api import sync_playwright

    path = chromium()
    with tempfile.TemporaryDirectory() as profile, sync_playwright() as driver:
        context = driver.chromium.launch_persistent_context(
            profile, executable_path=path, args=list(_FLAGS), headless=True, **options
        )
        context.set_default_timeout(TIMEOUT_MS)
        try:
            yield context
        finally:
            context.close()
