"""Tokens a second through the HTTP server, with 32 streams at once, against the engine alone.

    python benchmarks/http_overhead.py [--streams 32] [--tokens 64] [--rounds 5] [--no-save]

Both run the same requests to the base model in bfloat16, each in a process of its own, in turns; the clients are one
more process on the same cores. The engine's side is Engine.generate, so its time includes reading the prompts too.
Tokens that come while a stream is still being written share a chunk; how many do is one of the figures.
"""

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from typing import Any

PROMPT = "The structure of the protein shows that number {} "
MODEL = "smollm2-135m"


# The sides, each in its process: one line tells that it is ready, one line each round what was measured


def serve() -> None:
    """A server that tells its port."""
    from loraplex import EngineConfig
    from loraplex.server.lifecycle import run
    from loraplex.server.settings import LogSettings, ModelSettings, NetworkSettings, ServeConfig

    run(
        ServeConfig(
            model=ModelSettings(model=MODEL, served_name="base", dtype="bfloat16"),
            network=NetworkSettings(port=0),
            logs=LogSettings(log_requests=False),
            engine=EngineConfig(prefix_cache=False),
        ),
        on_ready=lambda server: print(server.port, flush=True),
    )


def run_alone(streams: int, tokens: int) -> None:
    """Seconds of Engine.generate, once for each line of the input."""
    from loraplex import Engine, EngineConfig, Request, SamplingParams
    from loraplex.bench.random_adapters import load_model

    sampling = SamplingParams(max_tokens=tokens, ignore_eos=True)
    requests = [Request(PROMPT.format(number), sampling=sampling) for number in range(streams)]
    with Engine(load_model(MODEL, "bfloat16"), EngineConfig(prefix_cache=False)) as engine:
        print("ready", flush=True)
        for _ in sys.stdin:
            start = time.perf_counter()
            results = engine.generate(requests)
            seconds = time.perf_counter() - start
            assert all(len(result.token_ids) == tokens for result in results), "an answer has the wrong length"
            print(json.dumps({"seconds": seconds}), flush=True)


async def read_streams(port: int, streams: int, tokens: int) -> dict[str, Any]:
    """Read all streams to their end: seconds, and in how many chunks the tokens came."""

    async def one(number: int) -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**20)
        body = {"model": "base", "prompt": PROMPT.format(number), "max_tokens": tokens, "temperature": 0}
        options = {"ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
        content = json.dumps(body | options).encode()
        head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
        head += "content-type: application/json\r\n"
        writer.write(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
        text = await reader.read(-1)
        writer.close()
        assert b'"completion_tokens":%d,' % tokens in text, text[-500:]
        return text.count(b'"usage":null')

    start = time.perf_counter()
    chunks = await asyncio.gather(*(one(number) for number in range(streams)))
    return {"seconds": time.perf_counter() - start, "chunks": sum(chunks)}


class Side:
    """A process that waits while the others work."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, __file__, *arguments]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None, "a pipe was asked for"
        self.ready = self.process.stdout.readline().strip()
        assert self.ready, f"{arguments} ended before it was ready"

    def round(self) -> dict[str, Any]:
        assert self.process.stdin is not None, "a pipe was asked for"
        assert self.process.stdout is not None, "a pipe was asked for"
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        figures: dict[str, Any] = json.loads(self.process.stdout.readline())
        return figures

    def close(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)


def run_client(port: int, streams: int, tokens: int) -> None:
    """One round of clients for each line of the input."""
    print("ready", flush=True)
    for _ in sys.stdin:
        print(json.dumps(asyncio.run(read_streams(port, streams, tokens))), flush=True)


def measure(streams: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Both sides in turns, after a warm-up."""
    size = ("--streams", str(streams), "--tokens", str(tokens))
    server, engine = Side("--side", "server"), Side("--side", "engine", *size)
    client = Side("--side", "client", "--port", server.ready, *size)
    figures: dict[str, list[dict[str, Any]]] = {"engine": [], "http": []}
    try:
        for number in range(rounds + 1):
            for name, side in (("engine", engine), ("http", client)):
                figure = side.round()
                if number:
                    figures[name].append(figure)
    finally:
        for side in (client, engine, server):
            side.close()
    rates = {name: [streams * tokens / one["seconds"] for one in figures[name]] for name in figures}
    ratios = [http / alone for http, alone in zip(rates["http"], rates["engine"], strict=True)]
    return {
        "tokens_per_s": {name: statistics.median(values) for name, values in rates.items()},
        "ratio": statistics.median(ratios),  # within a round: what else the machine does hits both alike
        "ratios": ratios,
        "tokens_per_chunk": streams * tokens * rounds / sum(one["chunks"] for one in figures["http"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-save", action="store_true")
    parser.add_argument("--side", choices=["server", "engine", "client"], help="what this process is, of a measurement")
    parser.add_argument("--port", type=int, help="of the server, for the clients")
    options = parser.parse_args()
    if options.side == "server":
        serve()
    elif options.side == "engine":
        run_alone(options.streams, options.tokens)
    elif options.side == "client":
        run_client(options.port, options.streams, options.tokens)
    else:
        report(options)


def report(options: argparse.Namespace) -> None:
    """Measure, print, and save."""
    from common import save

    result = measure(options.streams, options.tokens, options.rounds)
    speeds = ", ".join(f"{name} {speed:.0f}" for name, speed in result["tokens_per_s"].items())
    ratios = ", ".join(f"{ratio:.3f}" for ratio in result["ratios"])
    print(f"tokens/s: {speeds}; {result['tokens_per_chunk']:.2f} tokens a chunk")
    print(f"HTTP reaches {result['ratio']:.3f} of the engine alone (rounds: {ratios})")
    if not options.no_save:
        workload = {"model": MODEL, "dtype": "bfloat16", "streams": options.streams, "tokens": options.tokens}
        save("http_overhead", workload | {"rounds": options.rounds, "scheduling": scheduling()}, result)


def scheduling() -> str:
    """How the system shares the cores between these processes: it matters where threads and clients share them."""
    names = {os.SCHED_OTHER: "the system's usual one", os.SCHED_RR: "round robin, real time"}
    policy = os.sched_getscheduler(0)
    return names.get(policy, str(policy))


if __name__ == "__main__":
    main()
