"""Remakes docs/images/page.png: python -m scripts.page_picture

A server with SmolLM2, the examples' adapters and their mixture, and what a browser shows of it.
"""

import argparse
import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from loraplex.server.lifecycle import Server, load_model, serve
from loraplex.server.settings import ModelSettings, NetworkSettings, ServeConfig
from tests.server.page.browser import browsing

EXAMPLES = Path(__file__).parents[1] / "examples"
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "page.png"
SIZE = {"width": 1280, "height": 960}
WEAK = "0.35"  # at full weight the experts answer in one word, as they were trained to
MOLECULE = "Molecule CN1CC1(C)CC(C)=O: is its HOMO-LUMO gap low, medium or high?"
QUESTION = "Why is ice lighter than water? Answer in two sentences."
TIMEOUT_S = 300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=PICTURE)
    parser.add_argument("--dark", action="store_true", help="in dark colours")
    options = parser.parse_args()
    take(options.output, colors="dark" if options.dark else "light")


def take(output: Path, *, colors: Literal["light", "dark"] = "light") -> None:
    """Serve, ask one question and two columns another, hold the pointer over a token, and save what is seen."""
    with _serving() as server, browsing(viewport=SIZE, color_scheme=colors) as context:
        page = context.new_page()
        page.goto(f"http://127.0.0.1:{server.port}")
        page.select_option("#link-a select", "science")
        page.fill("#max-tokens", "80")
        page.fill("#temperature", "0")
        _ask(page, MOLECULE)
        page.locator(".prompt-read").evaluate("(one) => { one.open = true; }")
        page.fill("#link-a input[type=number]", WEAK)
        page.click("#add-column")
        _ask(page, QUESTION)
        page.locator(".turns").evaluate("(one) => { one.scrollTop = 0; }")
        page.locator("#setup").evaluate("(one) => { one.scrollTop = 0; }")
        page.locator(".turn").last.locator(".answer").first.locator(".token").nth(2).hover()
        page.wait_for_selector("#token-panel canvas")
        page.wait_for_timeout(2500)  # for the load to be asked once more
        page.screenshot(path=str(output))


def _ask(page: Any, text: str) -> None:
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")
    page.wait_for_selector(".streams", state="attached")
    page.wait_for_selector(".streams", state="detached", timeout=1000 * TIMEOUT_S)


@contextmanager
def _serving() -> Iterator[Server]:
    """A server in a thread, which has ended when the block is left: Python can't end beside one that still closes."""
    config = ServeConfig(
        model=ModelSettings(
            dtype="bfloat16",
            adapters={name: str(EXAMPLES / "adapters" / name) for name in ("protein", "quantum")},
            mixtures={"science": str(EXAMPLES / "mixtures" / "science")},
        ),
        network=NetworkSettings(port=0),
    )
    model, ready, found = load_model(config), threading.Event(), []

    def on_ready(server: Server) -> None:
        found.append(server)
        ready.set()

    thread = threading.Thread(target=lambda: asyncio.run(serve(model, config, on_ready=on_ready)), daemon=True)
    thread.start()
    assert ready.wait(TIMEOUT_S), "the server didn't start in time"
    try:
        yield found[0]
    finally:
        found[0].drain()
        thread.join(TIMEOUT_S)


if __name__ == "__main__":
    main()
