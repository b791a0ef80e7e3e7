"""One side of a comparison with other engines, in a process of its own and with nothing but the standard library here.

A side is a script that calls `serve` with a function that prepares: it gets the workload and returns what does a job
and the side's version. The parent (sides.py) writes one job a line, so that only one side works at a time.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

MARK = "RESULT "  # before the lines that are ours: libraries print too

Job = dict[str, Any]  # prompts, adapters (a name or None for each prompt) and new_tokens
Run = Callable[[Job], list[list[int]] | int]  # the new tokens of every request, or how many there were


def serve(prepare: Callable[[dict[str, Any]], tuple[Run, str]]) -> None:
    """Prepare, and do a job for each line of the standard input."""
    with open(sys.argv[1], encoding="utf-8") as file:
        workload = json.load(file)
    run, version = prepare(workload)
    tell({"version": version})
    for line in sys.stdin:
        job = json.loads(line)
        start = time.perf_counter()
        tokens = run(job)
        seconds = time.perf_counter() - start
        count = tokens if isinstance(tokens, int) else sum(map(len, tokens))
        tell({"seconds": seconds, "num_tokens": count, "tokens": None if isinstance(tokens, int) else tokens})


def tell(content: dict[str, Any]) -> None:
    print(MARK + json.dumps(content), flush=True)
