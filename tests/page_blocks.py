"""The shell and Python blocks of the documentation's pages, and a program that runs those of one page in their order.

    python tests/page_blocks.py docs/first-steps.md

A page's Python blocks share their names, as if a reader typed them one after the other; `loraplex serve` stays until
the page ends or serves again, on a port of its own. Trainings and loads are shortened (SHORTER). A block below the
comment `<!-- not run: REASON -->` is left out.
"""

import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "README.md", *ROOT.glob("docs/**/*.md")))
START_S = 300
# What takes long takes less: the command and its options stay.
SHORTER = (
    (r"--steps \d+", "--steps 2 --eval-records 8"),
    (r"max_steps=\d+", "max_steps=2"),
    (r"--warmup-steps \d+", "--warmup-steps 1"),
    (r"--(mixed-)?limit \d+", r"--\1limit 4"),
    (r"--seconds \d+", "--seconds 3"),
    (r"--requests \d+", "--requests 40"),
    (r"engine load --adapters \d+", "engine load --adapters 12"),
    (r"engine decode --case", "engine decode --new-tokens 9 --case"),
)
_FENCE = re.compile(
    r"(?:^<!-- not run: ([^\n]+) -->\n\n)?^```(sh|bash|python|py)\n(.*?)^```$", re.MULTILINE | re.DOTALL
)


class Block(NamedTuple):
    language: str  # sh or python
    text: str
    not_run: str | None  # why


def blocks_of(page: str) -> list[Block]:
    """The blocks of a page, in their order."""
    found = _FENCE.findall((ROOT / page).read_text(encoding="utf-8"))
    return [Block("python" if name.startswith("py") else "sh", text, why or None) for why, name, text in found]


def pages_that_run() -> list[str]:
    return [page for page in PAGES if any(block.not_run is None for block in blocks_of(page))]


def shortened(text: str) -> str:
    for pattern, replacement in SHORTER:
        text = re.sub(pattern, replacement, text)
    return text


class Runner:
    """Runs blocks in a folder that looks like a clone, and ends the server that they started."""

    def __init__(self, folder: Path) -> None:
        for name in ("examples", "data", "benchmarks", "scripts", "docs", "tests"):
            (folder / name).symlink_to(ROOT / name)
        self._folder = folder
        self._names: dict[str, Any] = {"__name__": "__main__"}
        self._server: subprocess.Popen[bytes] | None = None
        self._port = _free_port()

    def run(self, block: Block) -> None:
        text = shortened(block.text).replace("127.0.0.1:8000", f"127.0.0.1:{self._port}")
        if block.language == "python":
            print(text, flush=True)
            exec(compile(text, "block", "exec"), self._names)
            return
        for part in re.split(r"^(loraplex serve (?:[^\n]*\\\n)*[^\n]*\n)", text, flags=re.MULTILINE):
            if part.startswith("loraplex serve ") and "--print-config" not in part:
                self._serve(part)
            elif part.strip():
                print(part, flush=True)
                subprocess.run(["bash", "-euo", "pipefail", "-c", part], cwd=self._folder, check=True)

    def _serve(self, command: str) -> None:
        self.close()
        command = re.sub(r"(\s+#[^\n]*)?\n$", "", command.replace("--port 8000", "")) + f" --port {self._port}"
        print(command, flush=True)
        self._server = subprocess.Popen(["bash", "-c", "exec " + command], cwd=self._folder)
        end = time.monotonic() + START_S
        while time.monotonic() < end and self._server.poll() is None:
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{self._port}/health", timeout=5):
                return
            time.sleep(0.2)
        raise RuntimeError(f"no server within {START_S} s (status {self._server.poll()}): {command}")

    def close(self) -> None:
        if self._server is not None:
            self._server.terminate()
            self._server.wait(60)
            self._server = None


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def main(arguments: Sequence[str]) -> None:
    (page,) = arguments
    folder = Path.cwd()
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    runner = Runner(folder)
    try:
        for block in blocks_of(page):
            if block.not_run is None:
                runner.run(block)
    finally:
        runner.close()


if __name__ == "__main__":
    main(sys.argv[1:])
