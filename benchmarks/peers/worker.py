"""One side of benchmarks/engine_peers.py, in a process of its own and with nothing but the standard library here.

A side is a script that calls `serve` with a function that prepares: it gets the workload and returns what runs one
round and the side's version. Rounds start when the parent writes a line, so that only one side works at a time.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

MARK = "RESULT "  # before the lines that are ours: libraries print too

Round = Callable[[], list[list[int]] | int]  # the new tokens of every request, or how many there were


def serve(prepare: Callable[[dict[str, Any]], tuple[Round, str]]) -> None:
    """Prepare, warm up, and run a round for each line of the standard input."""
    with open(sys.argv[1], encoding="utf-8") as file:
        workload = json.load(file)
    run, version = prepare(workload)
    run()
    tell({"version": version})
    for _ in sys.stdin:
        start = time.perf_counter()
        tokens = run()
        seconds = time.perf_counter() - start
        count = tokens if isinstance(tokens, int) else sum(map(len, tokens))
        tell({"seconds": seconds, "num_tokens": count, "tokens": None if isinstance(tokens, int) else tokens})


def tell(content: dict[str, Any]) -> None:
    print(MARK + json.dumps(content), flush=True)
