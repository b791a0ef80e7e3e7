"""An open-loop load generator: requests are sent when they are due, whatever the server is doing."""

import asyncio
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraplex.bench.serve_client import Outcome, ServeClient
from loraplex.bench.serve_report import LoadReport
from loraplex.bench.workload import poisson_times, question_of, zipf_names
from loraplex.errors import ConfigError
from loraplex.training.data.records import read_records
from loraplex.validation import check_least

_WARM_UP = 8  # requests
_MAX_REQUESTS = 200_000
_WORDS = "spider silk of a protein the energy bond under load is measured in two"

Body = Mapping[str, Any]  # of a request


@dataclass(frozen=True, kw_only=True)
class ServeBench:
    """Requests arrive at an OpenAI-compatible server in a Poisson stream, for adapters drawn by Zipf's law.

    Without a rate, the capacity is measured first (all of `flood` requests at once), and `share` of it arrives.
    """

    url: str = "http://127.0.0.1:8000"
    rate: float | None = None  # requests/s
    share: float = 0.7
    flood: int = 96
    seconds: float = 30
    adapters: tuple[str, ...] = ()  # names or links; empty: what /v1/models lists
    exponent: float = 1.0
    prompt_files: tuple[str, ...] = ()  # chat files whose questions are the prompts, instead of random words
    prompt_words: int = 32
    max_tokens: int = 32
    ignore_eos: bool = False  # vLLM's and loraplex's field: every answer has max_tokens
    concurrency: int = 512  # requests open at once; more wait, and their wait counts
    timeout_s: float = 120
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"url is {self.url!r}; it must begin with http:// or https://.")
        check_least(self, dict.fromkeys(("flood", "prompt_words", "max_tokens", "concurrency"), 1))
        for option in ("seconds", "share", "timeout_s", *(() if self.rate is None else ("rate",))):
            if not 0 < getattr(self, option) < float("inf"):
                raise ConfigError(f"{option} is {getattr(self, option)}; it must be above 0 and finite.")
        if not 0 <= self.exponent < float("inf"):
            raise ConfigError(f"exponent is {self.exponent}; it must be 0 (all alike) or more, and finite.")
        if self.rate is not None:
            _check_count(self.rate, self.seconds)


def run_serve(
    bench: ServeBench, *, api_key: str | None = None, tell: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """The report of the stream, and the capacity if it was measured; `tell` hears what happens."""
    return asyncio.run(_run(bench, api_key, tell))


async def _run(bench: ServeBench, api_key: str | None, tell: Callable[[str], None]) -> dict[str, Any]:
    bodies = _bodies(bench)
    client = ServeClient(bench.url, api_key=api_key, timeout_s=bench.timeout_s, connections=bench.concurrency)
    async with client:
        names = list(bench.adapters) or await client.adapters()
        names_of = zipf_names(names, bench.exponent, bench.seed + 1)
        draws = random.Random(bench.seed + 2), random.Random(bench.seed + 3)

        def requests(times: Sequence[float]) -> list[tuple[float, Body]]:
            return [(at, {"model": names_of(draws[1]), **draws[0].choice(bodies)}) for at in times]

        tell("warming up ...")
        await send_all(client, requests([0.0] * _WARM_UP), bench)
        capacity, rate = None, bench.rate
        if rate is None:
            tell(f"measuring the capacity with {bench.flood} requests at once ...")
            capacity = (await send_all(client, requests([0.0] * bench.flood), bench)).capacity()
            rate = bench.share * capacity
            _check_count(rate, bench.seconds)
        times = poisson_times(rate, bench.seconds, random.Random(bench.seed))
        if not times:
            raise ConfigError(f"no request is due in {bench.seconds:g} s at {rate:.3g} a second; give more seconds.")
        tell(f"{len(times)} requests in {bench.seconds:g} s, {rate:.2f} a second, for {len(names)} adapters ...")
        report = await send_all(client, requests(times), bench)
    asked = {"capacity_requests_per_s": capacity, "rate": rate, "adapters_listed": len(names)}
    return asked | report.as_json()


async def send_all(client: ServeClient, requests: Sequence[tuple[float, Body]], bench: ServeBench) -> LoadReport:
    """Send every request at its time (seconds from now); ends when all have answered, failed or timed out."""
    places = asyncio.Semaphore(bench.concurrency)
    outcomes = [Outcome(adapter=body["model"]) for _, body in requests]
    start = time.perf_counter()

    async def one(due: float, body: Body, outcome: Outcome) -> None:
        outcome.lag_s = time.perf_counter() - due
        async with places:
            outcome.held_s = time.perf_counter() - due - outcome.lag_s
            try:
                async with asyncio.timeout(bench.timeout_s):
                    await client.stream(body, outcome, due)
            except TimeoutError:  # a stream that never ends; httpx's own limit is on its silence
                outcome.status, outcome.end_s = "timeout", time.perf_counter() - due

    async with asyncio.TaskGroup() as group:
        for (at, body), outcome in zip(requests, outcomes, strict=True):
            due = start + at
            if (wait := due - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            group.create_task(one(due, body, outcome))
    return LoadReport(outcomes=outcomes, seconds=time.perf_counter() - start)


def _check_count(rate: float, seconds: float) -> None:
    if rate * seconds > _MAX_REQUESTS:
        raise ConfigError(
            f"{rate:.3g} requests/s for {seconds:g} s are more than {_MAX_REQUESTS} requests; "
            "give a lower rate or fewer seconds."
        )


def _bodies(bench: ServeBench) -> list[Body]:
    """What requests say besides their model; drawn from alike."""
    options = {"max_tokens": bench.max_tokens, "temperature": 0} | ({"ignore_eos": True} if bench.ignore_eos else {})
    if not bench.prompt_files:
        draw = random.Random(bench.seed + 4)
        texts = (" ".join(draw.choices(_WORDS.split(), k=bench.prompt_words)) for _ in range(256))
        return [{"prompt": text, **options} for text in texts]
    records = [record for file in bench.prompt_files for record in read_records(Path(file))]
    asked = map(question_of, records)
    return [{"prompt" if isinstance(text, str) else "messages": text, **options} for text in asked]
