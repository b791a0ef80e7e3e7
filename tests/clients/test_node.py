"""Clients in JavaScript: the programs of node/, each of which ends with 0."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "node"
NODE = shutil.which("node")


@pytest.mark.skipif(NODE is None, reason="not on this machine: node")
@pytest.mark.skipif(
    not (FOLDER / "node_modules").is_dir(), reason="not on this machine: the packages (make setup-clients)"
)
@pytest.mark.parametrize("program", ["openai.mjs", "ai-sdk.mjs"])
def test_program_ends_well(url, program):
    run = subprocess.run(
        [str(NODE), program, url],
        cwd=FOLDER,
        env={**os.environ, "NEXT_TELEMETRY_DISABLED": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, run.stdout + run.stderr
