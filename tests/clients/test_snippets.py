"""The code of docs/clients.md, as a reader would type it one piece after the other."""

import asyncio

from tests.page_blocks import blocks_of


def test_code_of_the_page_runs(url, capsys):
    blocks = [block.text for block in blocks_of("docs/clients.md") if block.language == "python"]
    assert len(blocks) == 7
    names = {"__name__": "__main__"}
    asyncio.set_event_loop(asyncio.new_event_loop())
    for block in blocks:
        exec(compile(block.replace("http://127.0.0.1:8000/v1", url), "docs/clients.md", "exec"), names)
    told = capsys.readouterr().out
    assert "Sunny in" in told
    assert told.count("city") >= 5
