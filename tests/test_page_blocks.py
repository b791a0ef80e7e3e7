"""What the documentation tells its readers to type runs as it stands there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.page_blocks import PAGES, ROOT, blocks_of, pages_that_run, shortened

FENCES = re.compile(r"^```(sh|bash|python|py|console)$", re.MULTILINE)


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_found_and_one_that_is_not_run_says_why(page: str) -> None:
    text = (ROOT / page).read_text()
    found = blocks_of(page)
    assert len(found) == len(FENCES.findall(text)), "a block is not of the form that is run"
    assert len([block for block in found if block.not_run]) == text.count("<!-- not run: ")
    assert all(len(block.not_run) > 10 for block in found if block.not_run)


def test_blocks_are_shortened_without_losing_an_option() -> None:
    train = shortened("loraplex train adapters --steps 100 --rank 8")
    assert train == "loraplex train adapters --steps 2 --eval-records 8 --rank 8"
    assert shortened("StepsConfig(max_steps=100)") == "StepsConfig(max_steps=2)"


@pytest.mark.slow  # models are loaded, trained and served
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("page", pages_that_run())
def test_blocks_of_a_page_run_in_their_order(page: str, smollm2: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "tests" / "page_blocks.py"), page]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1100)
    assert run.returncode == 0, f"{run.stdout[-3000:]}\n{run.stderr[-5000:]}"
