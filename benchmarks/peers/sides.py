"""The parent's end of a side: engine_peers.py and cpu_peers.py start them and let them take turns."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from peers.worker import MARK, Job

HERE = Path(__file__).parent


class Side:
    """A worker process."""

    def __init__(self, name: str, python: str, script: str, workload: dict[str, Any], folder: Path) -> None:
        """Start `script` of this folder; its workload and what it says lie in `folder`."""
        self.name = name
        self._log = folder / f"{name}.log"
        file = folder / f"{name}.json"
        file.write_text(json.dumps(workload))
        threads = str(workload["threads"])
        with self._log.open("w") as errors:
            self._process = subprocess.Popen(
                [python, str(HERE / script), str(file)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": threads, "RAYON_NUM_THREADS": threads},
            )
        self.version = str(self._answer()["version"])

    def run(self, job: Job) -> dict[str, Any]:
        """Do one job: seconds, num_tokens, and tokens where the side tells them."""
        assert self._process.stdin is not None, "a pipe was asked for"
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None, "a pipe was asked for"
        for line in self._process.stdout:
            if line.startswith(MARK):
                content: dict[str, Any] = json.loads(line.removeprefix(MARK))
                return content
        raise SystemExit(f"{self.name} ended: {self._log.read_text()[-2000:]}")


def same_share(ours: list[list[int]], theirs: list[list[int]] | None) -> float | None:
    """The share of tokens that are equal, up to each answer's first different one."""
    if theirs is None:
        return None
    pairs = [list(zip(one, other, strict=True)) for one, other in zip(ours, theirs, strict=True)]
    same = [next((i for i, (a, b) in enumerate(row) if a != b), len(row)) for row in pairs]
    return sum(same) / sum(map(len, pairs))
