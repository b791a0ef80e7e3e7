"""The newcomer's path finds its commands in the pages (scripts/newcomer.py walks it)."""

import pytest

from scripts.newcomer import ACTIVATE, FIRST_STEPS, PORT, blocks


def test_every_step_is_a_block_of_the_pages() -> None:
    assert blocks("README.md", "Try it") == ["make demo\n"]
    assert ACTIVATE in blocks(FIRST_STEPS, "1. Set up")[0]
    (train,) = blocks(FIRST_STEPS, "3. Train your own")
    serve, ask = blocks(FIRST_STEPS, "4. Serve it")
    assert "loraplex train adapters" in train
    assert serve.startswith(f"loraplex serve --port {PORT} ")
    assert f"http://127.0.0.1:{PORT}/" in ask


def test_missing_block_is_named() -> None:
    with pytest.raises(AssertionError, match="no shell block below 'Nowhere'"):
        blocks("README.md", "Nowhere")
