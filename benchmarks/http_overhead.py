"""Tokens a second through the HTTP server, with 32 streams at once, against the engine alone.

    python benchmarks/http_overhead.py [--streams 32] [--tokens 64] [--rounds 3]

Both run the same requests on the same model in this process, in turns; the clients are one other process.
"""

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import torch

from loraplex import Engine, EngineConfig, MultiLoraModel, Request, SamplingParams
from loraplex.server.lifecycle import Server, run_server
from loraplex.server.settings import LogSettings, ModelSettings, NetworkSettings, ServeConfig

PROMPT = "The structure of the protein shows that number {} "


async def read_streams(port: int, streams: int, tokens: int) -> float:
    """Seconds until all streams are read to their end."""

    async def one(number: int) -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**20)
        body = {"model": "base", "prompt": PROMPT.format(number), "max_tokens": tokens, "stream": True}
        content = json.dumps(body | {"temperature": 0, "ignore_eos": True}).encode()
        head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nconnection: close\r\n"
        writer.write(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
        text = await reader.read(-1)
        writer.close()
        assert b'"finish_reason":"length"' in text, text[-500:]
        return text.count(b"data: ")

    start = time.perf_counter()
    await asyncio.gather(*(one(number) for number in range(streams)))
    return time.perf_counter() - start


def over_http(model: MultiLoraModel, streams: int, tokens: int, rounds: int) -> list[float]:
    """Tokens a second of each round, through a server in a thread."""
    ready, found = threading.Event(), []

    def on_ready(server: Server) -> None:
        found.append(server)
        ready.set()

    config = ServeConfig(
        model=ModelSettings(served_name="base"),
        network=NetworkSettings(port=0),
        logs=LogSettings(log_requests=False),
        engine=EngineConfig(prefix_cache=False),
    )
    thread = threading.Thread(target=lambda: run_server(model, config, on_ready=on_ready))
    thread.start()
    ready.wait()
    rates = []
    for _ in range(rounds):
        client = [sys.executable, __file__, "--client", str(found[0].port)]
        done = subprocess.run(
            [*client, "--streams", str(streams), "--tokens", str(tokens)], capture_output=True, text=True, check=True
        )
        rates.append(streams * tokens / float(done.stdout))
    found[0].drain()
    thread.join()
    return rates


def alone(model: MultiLoraModel, streams: int, tokens: int, rounds: int) -> list[float]:
    """The same through Engine.generate."""
    sampling = SamplingParams(max_tokens=tokens, ignore_eos=True)
    requests = [Request(PROMPT.format(number), sampling=sampling) for number in range(streams)]
    rates = []
    with Engine(model, EngineConfig(prefix_cache=False)) as engine:
        engine.generate(requests[:2])
        for _ in range(rounds):
            start = time.perf_counter()
            engine.generate(requests)
            rates.append(streams * tokens / (time.perf_counter() - start))
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--client", type=int, help="read the streams of the server at this port")
    options = parser.parse_args()
    if options.client is not None:
        print(asyncio.run(read_streams(options.client, options.streams, options.tokens)))
        return
    with ThreadPoolExecutor(1) as loader:  # a thread's compute threads end with it, as in `loraplex serve`
        model = loader.submit(MultiLoraModel.from_pretrained, "smollm2-135m", dtype="bfloat16").result()
    with ThreadPoolExecutor(1) as runner:
        engine = runner.submit(alone, model, options.streams, options.tokens, options.rounds).result()
    http = over_http(model, options.streams, options.tokens, options.rounds)
    ratio = statistics.median(http) / statistics.median(engine)
    print(f"engine alone {[round(rate) for rate in engine]} tokens/s, over HTTP {[round(rate) for rate in http]}")
    print(f"{torch.get_num_threads()} threads, {options.streams} streams: HTTP reaches {ratio:.3f} of the engine alone")


if __name__ == "__main__":
    main()
