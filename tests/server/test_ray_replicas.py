"""Two replicas on this machine through Ray Serve: who gets which request, and what happens when one is killed."""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from tests.server.replica_models import NUM_ADAPTERS, write_folders

pytestmark = [pytest.mark.needs("ray"), pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).parent.parent.parent
NAMES = [f"adapter{i}" for i in range(NUM_ADAPTERS)]
START_S = 240
LONG = 100  # tokens: a second at least


@dataclass
class Cluster:
    process: subprocess.Popen[str]
    url: str

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def replicas(self) -> list[psutil.Process]:
        return [child for child in self.family() if "ServeReplica" in " ".join(_command(child))]

    def complete(self, model: str, max_tokens: int = 2) -> httpx.Response:
        body = {"model": model, "prompt": "abc", "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=120, trust_env=False)

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    def wait_for_replicas(self, count: int) -> None:
        stop = time.monotonic() + START_S
        seen: set[str] = set()
        while len(seen) < count:
            assert time.monotonic() < stop, f"{len(seen)} of {count} replicas answer"
            seen |= {self.complete(name).headers["x-replica"] for name in NAMES[:8]}
            time.sleep(0.5)


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("adapters")
    write_folders(folder)
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "tests.server.serve_replicas", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment) as process:
        try:
            for line in process.stdout:
                if line.startswith("PORT"):
                    break
            else:
                raise AssertionError("the replicas didn't start")
            drain = ThreadPoolExecutor(1).submit(lambda: list(process.stdout))
            running = Cluster(process, f"http://127.0.0.1:{line.split()[1]}")
            running.wait_for_replicas(2)
            yield running
            process.send_signal(signal.SIGTERM)
            assert process.wait(120) == 0
            drain.result(60)
        finally:
            process.kill()


def test_requests_go_where_their_adapter_is_held(cluster: Cluster):
    with ThreadPoolExecutor(4) as pool:
        first = list(pool.map(cluster.complete, NAMES))
        time.sleep(3)  # until the replicas have told what they hold now
        names = random.Random(0).choices(NAMES, k=400)
        later = list(pool.map(cluster.complete, names))
    assert {response.status_code for response in (*first, *later)} == {200}
    rates = [_hit_rate(responses) for responses in (first, later)]
    print(f"hit rate: first round {rates[0]:.3f}, later {rates[1]:.3f}")
    assert rates[0] < 0.95, "a replica can't hold all adapters, or this test shows nothing"
    assert rates[1] >= 0.9
    shares = Counter(response.headers["x-replica"] for response in later)
    assert len(shares) == 2
    assert min(shares.values()) > 100


def test_links_and_errors_pass_through_unchanged(cluster: Cluster):
    assert cluster.complete("adapter3:0.5+adapter4").status_code == 200
    assert cluster.complete("tiny").status_code == 200
    refusal = cluster.complete("nobody")
    assert (refusal.status_code, refusal.json()["error"]["code"]) == (404, "model_not_found")
    assert len(refusal.headers.get_list("x-request-id")) == 1
    for headers, status in (({"content-type": "application/json"}, 400), ({}, 415)):
        url = f"{cluster.url}/v1/completions"
        broken = httpx.post(url, content=b"{", headers=headers, timeout=60, trust_env=False)
        assert broken.status_code == status
    refusal = httpx.delete(f"{cluster.url}/v1/adapters/adapter1", timeout=60, trust_env=False)
    assert (refusal.status_code, refusal.json()["error"]["code"]) == (501, "not_with_replicas")
    assert len(cluster.client().models.list().data) == NUM_ADAPTERS + 1
    text = cluster.complete("adapter5", 12).json()["choices"][0]["text"]
    assert "".join(_stream(cluster, "adapter5", 12)) == text


def test_metrics_of_all_replicas_come_from_the_front(cluster: Cluster):
    cluster.wait_for_replicas(2)
    counts = Counter(cluster.complete(name, 5).headers["x-replica"] for name in NAMES[:20])
    assert len(counts) == 2
    families = _metrics(cluster)
    assert families["loraplex_replicas"][0].value == 2
    told = {sample.labels["replica"]: sample.value for sample in families["loraplex_new_tokens"]}
    assert set(told) == set(counts)
    assert all(told[replica] >= 5 * count for replica, count in counts.items())
    by_route = families["loraplex_http_requests"]
    assert {sample.labels["replica"] for sample in by_route} == set(counts)
    assert sum(sample.value for sample in families["loraplex_front_requests"] if sample.name.endswith("_total")) >= 20


def test_nothing_listens_beyond_this_machine(cluster: Cluster):
    listening = [
        connection.laddr.ip
        for process in (psutil.Process(cluster.process.pid), *cluster.family())
        if process.is_running()
        for connection in process.net_connections()
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) > 1
    assert all(address in ("127.0.0.1", "::ffff:127.0.0.1", "::1") for address in listening), listening


def test_killed_replica_takes_no_request_along_unheard(cluster: Cluster):
    cluster.wait_for_replicas(2)
    expected = {name: cluster.complete(name, LONG).json()["choices"][0]["text"] for name in NAMES[:16]}
    retries = _retries(cluster)
    before = {process.pid for process in cluster.replicas()}
    assert len(before) == 2
    with ThreadPoolExecutor(32) as pool:
        read: list[str] = []  # pieces of all streams
        streams = {name: pool.submit(_read, cluster, name, read) for name in NAMES[:16]}
        whole = {name: pool.submit(cluster.complete, name, LONG) for name in NAMES[:16]}
        stop = time.monotonic() + 60
        while len(read) < 32:
            assert time.monotonic() < stop, "the streams didn't begin"
            time.sleep(0.005)
        os.kill(min(before), signal.SIGKILL)
        after = [cluster.complete(name, LONG) for name in NAMES[:16]]  # while the others still run
        outcomes: Counter[str] = Counter()
        for name, future in whole.items():
            response = future.result()
            outcomes[_checked(response, expected[name])] += 1
        for name, future in streams.items():
            error = future.exception()
            if error is None:
                assert future.result() == expected[name]
            else:
                assert isinstance(error, openai.APIError), error
                assert error.code == "replica_died"
            outcomes["stream whole" if error is None else "stream told"] += 1
    print(dict(outcomes))
    for name, response in zip(NAMES, after, strict=False):
        assert response.status_code == 200, response.text
        assert response.json()["choices"][0]["text"] == expected[name]
    assert outcomes["stream told"] > 0, "nothing was running on the replica that was killed"
    assert outcomes["stream whole"] > 0
    assert outcomes["answered"] == 16, "of what hadn't begun, all was sent to the other replica"
    assert _retries(cluster) > retries
    cluster.wait_for_replicas(2)
    assert before != {process.pid for process in cluster.replicas()}


def _checked(response: httpx.Response, expected: str) -> str:
    """A right answer, or an error that says to try again."""
    if response.status_code == 200:
        assert response.json()["choices"][0]["text"] == expected
        return "answered"
    assert (response.status_code, response.json()["error"]["code"]) == (503, "replica_died")
    assert "retry-after" in response.headers
    return "refused"


def _metrics(cluster: Cluster) -> dict[str, list[Sample]]:
    text = httpx.get(f"{cluster.url}/metrics", timeout=60, trust_env=False).text
    return {family.name: family.samples for family in text_string_to_metric_families(text)}


def _retries(cluster: Cluster) -> float:
    samples = _metrics(cluster)["loraplex_replica_retries"]
    return next(sample.value for sample in samples if sample.name.endswith("_total"))


def _read(cluster: Cluster, model: str, read: list[str]) -> str:
    """A stream's whole text; its pieces are noted as they come."""
    pieces = []
    for piece in _stream(cluster, model, LONG):
        pieces.append(piece)
        read.append(piece)
    return "".join(pieces)


def _stream(cluster: Cluster, model: str, max_tokens: int) -> Iterator[str]:
    options = {"ignore_eos": True}
    with cluster.client() as client:
        for chunk in client.completions.create(
            model=model, prompt="abc", max_tokens=max_tokens, temperature=0, stream=True, extra_body=options
        ):
            yield from (choice.text for choice in chunk.choices)


def _hit_rate(responses: list[httpx.Response]) -> float:
    return sum(response.headers["x-adapters-held"] == "yes" for response in responses) / len(responses)
