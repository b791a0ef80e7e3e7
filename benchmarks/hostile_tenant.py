"""What one tenant with bad intentions costs another: the good one's time to its first token, alone and beside attacks.

    python benchmarks/hostile_tenant.py [--seconds 20] [--attack NAME ...] [--no-save]

A server with SmolLM2-135M in float32 and two keys. The good tenant streams greedy answers of its own adapter at a fixed
rate, in processes of its own; every answer has to be the one that it gets alone. Beside it each attack comes 20 times a
second from the other key, in turns with times without any; an attacker never waits longer than 2 s for an answer.
"""

import argparse
import asyncio
import json
import os
import re
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

MODEL = "smollm2-135m"
RATE = 4.0  # of the good tenant, requests a second
TOKENS = 12  # of its answers
PROMPTS = [f"The {thing} of spider silk is" for thing in ("strength", "colour", "structure", "price", "weight", "use")]
ATTACKS_PER_S = 20.0
LEAD_S = 2.0  # an attack has begun, and its process has started, before the good tenant's answers are timed
PATIENCE_S = 2.0  # of an attacker

Attack = Callable[["Client"], Awaitable[None]]


class Client:
    """Plain HTTP with a key, so that the client costs little and can say what no library would."""

    def __init__(self, port: int, key: str) -> None:
        self.port, self.key = port, key

    async def send(self, path: str, body: object, *, method: str = "POST", read: bool = True) -> bytes:
        """The whole answer; `body` is JSON, or bytes as they are."""
        content = body if isinstance(body, bytes) else encoded(body)
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=2**22)
        try:
            writer.write(self.head(method, path, len(content)) + content)
            return await reader.read(-1 if read else 1)
        finally:
            writer.close()

    async def first_token(self, body: dict[str, Any]) -> tuple[float, str]:
        """Seconds to the first token of a stream, and its whole text."""
        content, began = json.dumps(body | {"stream": True}).encode(), time.perf_counter()
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=2**22)
        writer.write(self.head("POST", "/v1/completions", len(content)) + content)
        first, texts = None, []
        async for line in reader:
            if not line.startswith(b"data: {"):
                if not line.startswith(b"HTTP/1.1 200") and line.startswith(b"HTTP"):
                    raise RuntimeError((line + await reader.read(2000)).decode())
                continue
            text = json.loads(line[6:])["choices"][0]["text"]
            first = time.perf_counter() - began if first is None else first
            texts.append(text)
        writer.close()
        if first is None:
            raise RuntimeError("a stream ended without a token")
        return first, "".join(texts)

    def head(self, method: str, path: str, length: int) -> bytes:
        fields = {
            "host": f"127.0.0.1:{self.port}",
            "authorization": f"Bearer {self.key}",
            "content-type": "application/json",
            "connection": "close",
            "content-length": str(length),
        }
        return "\r\n".join([f"{method} {path} HTTP/1.1", *(f"{n}: {v}" for n, v in fields.items()), "", ""]).encode()


def _asks(**options: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": "a", "max_tokens": 4, "temperature": 0} | options


def _endless_schema() -> dict[str, Any]:
    schema: dict[str, Any] = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}
    for _ in range(8):
        schema = {"anyOf": [schema, {"type": "array", "items": schema, "maxItems": 10**6}]}
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


# Attacks: each is one try. What they send is made once: the attacker's own work is none of the server's.


def encoded(body: object) -> bytes:
    return json.dumps(body).encode()


LONG_STEERED = encoded(_asks(prompt="a" * 300_000, steer=[{"text": "a", "strength": 2}]))
RANGES = [{"start": i % 90, "end": i % 90 + 1, "strength": 2} for i in range(20_000)]
MANY_RANGES = encoded(_asks(prompt="a b " * 50, steer=RANGES))
NUMBER_LISTS = encoded(_asks(prompt=[[1]] * 400_000))
DEEP_JSON = b'{"model": ' + b"[" * 500_000
ENDLESS_SCHEMA = encoded(_asks(response_format=_endless_schema()))


async def long_steered_prompt(client: Client) -> None:
    await client.send("/v1/completions", LONG_STEERED)


async def many_steered_ranges(client: Client) -> None:
    await client.send("/v1/completions", MANY_RANGES)


async def number_lists(client: Client) -> None:
    await client.send("/v1/completions", NUMBER_LISTS)


async def deep_json(client: Client) -> None:
    await client.send("/v1/completions", DEEP_JSON)


async def impossible_options(client: Client) -> None:
    for options in ({"n": 10**5}, {"logprobs": 10**6}, {"priority": "x"}, {"prompt": "\ud800"}, {"max_tokens": 1e300}):
        await client.send("/v1/completions", _asks(**options))


async def leaving_early(client: Client) -> None:
    await client.send("/v1/completions", _asks(max_tokens=2000, stream=True, ignore_eos=True), read=False)


async def endless_schemas(client: Client) -> None:
    await client.send("/v1/completions", ENDLESS_SCHEMA)


async def attention_as_lists(client: Client) -> None:
    capture = {"queries": "all", "encoding": "list"}
    await client.send("/v1/completions", _asks(prompt="silk " * 60, capture_attention=capture, max_tokens=2))


async def wrong_keys(client: Client) -> None:
    await Client(client.port, f"lpx_00000000_{time.perf_counter_ns()}").send("/v1/completions", _asks())


async def slow_headers(client: Client) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", client.port)
    writer.write(b"GET /health HTTP/1.1\r\nhost: x")
    try:
        await asyncio.sleep(60)
    finally:
        writer.close()


def loading(folder: str) -> Attack:
    async def load(client: Client) -> None:
        path = str(Path(os.environ["HOSTILE_ADAPTERS"]) / folder)
        await client.send("/v1/adapters", {"name": f"bad/{folder}", "path": path})

    return load


FOLDERS = ("pattern", "long_name", "deep_config", "sparse_weights", "truncated_weights", "huge_mixture", "huge_setting")
ATTACKS: dict[str, Attack] = {
    **{
        attack.__name__: attack
        for attack in (
            long_steered_prompt,
            many_steered_ranges,
            number_lists,
            deep_json,
            impossible_options,
            leaving_early,
            endless_schemas,
            attention_as_lists,
            wrong_keys,
            slow_headers,
        )
    },
    **{f"load_{folder}": loading(folder) for folder in FOLDERS},
}


def write_bad_folders(root: Path, good: Path) -> None:
    """What the attacks load, made from an adapter that is whole."""
    config = json.loads((good / "adapter_config.json").read_text())
    weights = (good / "adapter_model.safetensors").read_bytes()
    long_name = json.dumps({"a." * 390_000: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    sparse = json.dumps({"x": {"dtype": "F32", "shape": [2**29], "data_offsets": [0, 2**31]}}).encode()
    mixture = {"peft_type": "XLORA", "adapters": {"0": "a"}, "xlora_depth": 4_000_000, "xlora_size": 2048}
    contents: dict[str, tuple[object, bytes]] = {
        "pattern": (config | {"target_modules": "(.*)*(.*)*(.*)*!"}, weights),
        "long_name": (config, struct.pack("<Q", len(long_name)) + long_name + bytes(4)),
        "deep_config": (b'{"r": ' + b"[" * 100_000, weights),
        "sparse_weights": (config, struct.pack("<Q", len(sparse)) + sparse),
        "truncated_weights": (config, weights[: len(weights) // 2]),
        "huge_mixture": (config | mixture, weights),
        "huge_setting": (config | {"x" * 10_000_000: 1}, weights),
    }
    for name, (settings, tensors) in contents.items():
        folder = root / name
        folder.mkdir(parents=True)
        text = settings if isinstance(settings, bytes) else json.dumps(settings).encode()
        (folder / "adapter_config.json").write_bytes(text)
        (folder / "adapter_model.safetensors").write_bytes(tensors)
        if name == "sparse_weights":
            os.truncate(folder / "adapter_model.safetensors", 8 + len(sparse) + 2**31)


async def attack_for(name: str, client: Client, seconds: float) -> None:
    """Tries of one kind at a fixed rate, whatever becomes of those before."""

    async def one() -> None:
        with suppress(OSError, asyncio.TimeoutError):
            await asyncio.wait_for(ATTACKS[name](client), PATIENCE_S if name != "slow_headers" else None)

    tries, began = set(), time.perf_counter()
    for number in range(int(seconds * ATTACKS_PER_S)):
        await asyncio.sleep(max(0.0, began + number / ATTACKS_PER_S - time.perf_counter()))
        tries.add(asyncio.create_task(one()))
    for waiting in tries:
        waiting.cancel()
    await asyncio.gather(*tries, return_exceptions=True)


# The good tenant


async def good_answers(client: Client, seconds: float) -> tuple[list[float], list[tuple[int, str]], list[str]]:
    """Seconds to the first token of each request, answers by number of their prompt, and what failed."""
    times: list[float] = []
    answers: list[tuple[int, str]] = []
    failures: list[str] = []

    async def one(number: int) -> None:
        options = {"max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
        try:
            first, text = await asyncio.wait_for(
                client.first_token({"model": "good/a", "prompt": PROMPTS[number], **options}), 120
            )
        except (TimeoutError, OSError, RuntimeError) as error:
            failures.append(f"{type(error).__name__}: {error}")
            return
        times.append(first)
        answers.append((number, text))

    asked, began = [], time.perf_counter()
    for number in range(int(seconds * RATE)):
        await asyncio.sleep(max(0.0, began + number / RATE - time.perf_counter()))
        asked.append(asyncio.create_task(one(number % len(PROMPTS))))
    await asyncio.gather(*asked)
    return times, answers, failures


@contextmanager
def server(folder: Path) -> Iterator[tuple[int, str, str]]:
    """Its port, and the keys of the good and the bad tenant."""
    import torch

    from loraplex.bench.random_adapters import load_model, write_random_folders
    from loraplex.server.auth.keys import KeyFile

    shapes = load_model(MODEL, "float32").adaptable.shapes
    (good,) = write_random_folders(shapes, folder / "good", [8], torch.float32).values()
    write_bad_folders(folder / "bad", good)
    keys = KeyFile(folder / "keys.json")
    good_key, _ = keys.create(use=("good/*",))
    roots = (str(folder / "bad"),)
    bad_key, _ = keys.create(use=("bad/*",), load=("bad/*",), roots=roots, tokens_per_minute=1000)
    command = [
        sys.executable,
        "-c",
        "from loraplex.cli.app import app; app()",
        "serve",
        "--model",
        MODEL,
        "--port",
        "0",
    ]
    command += ["--dtype", "float32", "--adapter", f"good/a={good}", "--keys-file", str(keys.path)]
    command += ["--adapter-root", str(folder / "bad"), "--no-log-requests"]
    log = folder / "log"
    with log.open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        yield _port(process, log), good_key, bad_key
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def _port(process: subprocess.Popen[str], log: Path) -> int:
    for _ in range(600):
        found = re.search(r"http://127\.0\.0\.1:(\d+)", log.read_text())
        if found is not None:
            return int(found[1])
        if process.poll() is not None:
            break
        time.sleep(0.2)
    raise RuntimeError(f"the server did not start: {log.read_text()[-2000:]}")


def measure(names: list[str], seconds: float) -> dict[str, Any]:
    """Each attack between two times without one."""
    with tempfile.TemporaryDirectory() as folder, server(Path(folder)) as (port, good_key, bad_key):
        good = Client(port, good_key)
        expected = dict(asyncio.run(good_answers(good, 2 * len(PROMPTS) / RATE))[1])  # also warms up
        environment = os.environ | {"HOSTILE_ADAPTERS": str(Path(folder) / "bad")}
        phases: list[tuple[str | None, dict[str, Any]]] = []
        for name in [name for attack in names for name in (None, attack)]:
            attacker = None
            if name is not None:
                own = ["--side", name, "--port", str(port), "--key", bad_key, "--seconds", str(seconds + LEAD_S)]
                attacker = subprocess.Popen([sys.executable, __file__, *own], env=environment)
                time.sleep(LEAD_S)
            times, answers, failures = asyncio.run(good_answers(good, seconds))
            if attacker is not None:
                attacker.wait(120)
            wrong = sum(text != expected[number] for number, text in answers)
            figures = {"p50_s": _quantile(times, 0.5), "p99_s": _quantile(times, 0.99), "wrong": wrong}
            phases.append((name, figures | {"failures": failures, "requests": int(seconds * RATE)}))
            print(f"{name or 'alone':22} p50 {figures['p50_s']:.3f} s  p99 {figures['p99_s']:.3f} s  {wrong} wrong,"
                  f" {len(failures)} failed", flush=True)  # fmt: skip
        alone = [figures for name, figures in phases if name is None]
        p99_alone = statistics.median(figures["p99_s"] for figures in alone)
        attacks = {name: figures for name, figures in phases if name is not None}
        for figures in attacks.values():
            figures["p99_ratio"] = figures["p99_s"] / p99_alone
        return {"alone": alone, "p99_alone_s": p99_alone, "attacks": attacks}


def _quantile(times: list[float], part: float) -> float:
    return sorted(times)[min(len(times) - 1, int(part * len(times)))] if times else float("inf")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each phase")
    parser.add_argument("--attack", action="append", choices=list(ATTACKS), help="default: all")
    parser.add_argument("--no-save", action="store_true")
    parser.add_argument("--side", choices=list(ATTACKS), help="be this attacker")
    parser.add_argument("--port", type=int)
    parser.add_argument("--key")
    options = parser.parse_args()
    if options.side is not None:
        os.nice(19)  # attackers are on other machines: their work is not to take the server's processors
        asyncio.run(attack_for(options.side, Client(options.port, options.key), options.seconds))
        return
    result = measure(options.attack or list(ATTACKS), options.seconds)
    worst = max(result["attacks"], key=lambda name: result["attacks"][name]["p99_ratio"])
    print(f"worst: {worst}, p99 {result['attacks'][worst]['p99_ratio']:.2f} of that alone")
    if not options.no_save:
        from common import save

        workload = {"model": MODEL, "dtype": "float32", "rate": RATE, "tokens": TOKENS, "seconds": options.seconds}
        save("hostile_tenant", workload | {"attacks_per_s": ATTACKS_PER_S}, result)


if __name__ == "__main__":
    main()
