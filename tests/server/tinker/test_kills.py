"""A training server that is killed at random, with clients that send again what was not answered, as the SDK does."""

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from loraplex.server.tinker.wire import CLASSES, MEDIA
from tests.server.tinker.tinker_client import loss_body

ROOT = Path(__file__).parents[3]
NUM_KILLS = 20
NUM_CLIENTS = 3
TIMEOUT_S = 600
PAUSE_S = 0.1  # of a client between its steps
PROMPT = [5, 9, 17, 3]
LOSSES = ("cross_entropy", "importance_sampling", "ppo")


class Servers:
    """One server after the other, at one address and with one folder."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.pid = 0

    def start(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None, "there are pipes"  # noqa: PT018
        self._process.stdin.write(f"{self.port}\n")
        self._process.stdin.flush()
        self.pid = int(self._process.stdout.readline())

    def wait_until_ready(self) -> None:
        stop = time.monotonic() + TIMEOUT_S
        while time.monotonic() < stop:
            try:
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.05)
        raise AssertionError("the server didn't start")

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        while True:
            try:
                os.kill(self.pid, 0)
            except ProcessLookupError:
                return
            time.sleep(0.01)


@contextmanager
def servers(folder: Path) -> Iterator[Servers]:
    command = [sys.executable, "-m", "tests.server.tinker.killable_server", str(folder)]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}/src:{ROOT}", "OMP_NUM_THREADS": "1"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        )
        own = Servers(process)
        try:
            own.start()
            own.wait_until_ready()
            yield own
        finally:
            if own.pid:
                own.kill()
            process.kill()
            process.wait()


class PatientClient:
    """A session and a run, whose requests come again under their numbers until they are answered."""

    def __init__(self, url: str, number: int) -> None:
        self.number = number
        self._http = httpx.Client(base_url=f"{url}/api/v1", headers={"x-api-key": "tml-none"}, timeout=30)
        self._seq = self._num_samples = 0
        session = self._sent("create_session", {"tags": [], "sdk_version": "0"})["session_id"]
        lora = {"rank": 4, "seed": number}
        begin = {"session_id": session, "model_seq_id": 0, "base_model": "tiny", "lora_config": lora}
        self._session, self._run = session, self._call("create_model", begin)["model_id"]

    def step(self) -> list[float]:
        """One step's loss, and the log probabilities of the prompt and of a sample with the new weights."""
        self._seq += 2
        data = loss_body(self._run, self._seq - 1, self._data(), LOSSES[self.number % len(LOSSES)])
        adam = {"model_id": self._run, "seq_id": self._seq, "adam_params": {"learning_rate": 1e-3, "eps": 1e-8}}
        promises = [self._sent("forward_backward", data), self._sent("optim_step", adam)]
        loss = CLASSES["ForwardBackwardOutput"].FromString(
            self._result(promises[0], lambda: self._sent("forward_backward", data))
        )
        self._result(promises[1], lambda: self._sent("optim_step", adam))
        return [loss.metrics[0].value, *self._sample()]

    def _data(self) -> list[dict[str, Any]]:
        draw = random.Random(1000 * self.number)
        tokens = [draw.randrange(3, 120) for _ in range(12)]
        inputs = {"weights": [1.0] * 11} if self.number % len(LOSSES) == 0 else {}
        if not inputs:
            inputs = {"logprobs": [-5.0] * 11, "advantages": [draw.uniform(-1, 1) for _ in range(11)]}
        return [{"tokens": tokens[:-1], "target_tokens": tokens[1:], **inputs}]

    def _sample(self) -> list[float]:
        self._seq += 1
        self._num_samples += 1
        publish = {"model_id": self._run, "seq_id": self._seq, "sampling_session_seq_id": self._num_samples}
        sampler = self._call("save_weights_for_sampler", publish)["sampling_session_id"]
        asked = {
            "sampling_session_id": sampler,
            "seq_id": 0,
            "prompt": {"chunks": [{"type": "encoded_text", "tokens": PROMPT}]},
            "sampling_params": {"max_tokens": 3, "temperature": 0.0, "stop": []},
            "prompt_logprobs": True,
        }
        found = CLASSES["SampleResponse"].FromString(self._call("asample", asked))
        logprobs = memoryview(found.prompt_logprobs).cast("f")[1:], memoryview(found.sequences[0].logprobs).cast("f")
        return [value for part in logprobs for value in part]

    def _call(self, call: str, body: dict[str, Any]) -> Any:
        return self._result(self._sent(call, body), lambda: self._sent(call, body))

    def _sent(self, call: str, body: dict[str, Any] | bytes) -> Any:
        """A request that was taken."""
        content = {"content": body, "headers": {"content-type": MEDIA}} if isinstance(body, bytes) else {"json": body}
        return self._answer(call, content).json()

    def _result(self, promise: Any, send_again: Callable[[], Any]) -> Any:
        while True:
            asked = {"json": {"request_id": promise["request_id"]}}
            answer = self._answer("retrieve_future", asked, (200, 408, 410))
            if answer.status_code == 200:
                is_json = answer.headers["content-type"].startswith("application/json")
                found = answer.json() if is_json else answer.content
                assert not (is_json and "error" in found), found
                return found
            if answer.status_code == 410:  # what a server was asked to sample goes with it
                promise = send_again()

    def _answer(self, call: str, content: dict[str, Any], wanted: tuple[int, ...] = (200,)) -> httpx.Response:
        stop = time.monotonic() + TIMEOUT_S
        while time.monotonic() < stop:
            try:
                answer = self._http.post(f"/{call}", **content)
            except httpx.TransportError:
                time.sleep(0.05)
                continue
            if answer.status_code in wanted:
                return answer
            assert answer.status_code == 429 or answer.status_code >= 500, answer.text
            time.sleep(0.05)
        raise AssertionError(f"{call} had no answer")


def curves(url: str, until: Callable[[int], bool]) -> dict[int, list[list[float]]]:
    """Of clients at work at the same time, each until it is told that it has made enough steps."""
    found: dict[int, list[list[float]]] = {number: [] for number in range(NUM_CLIENTS)}
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            client = PatientClient(url, number)
            while not until(len(found[number])):
                found[number].append(client.step())
                time.sleep(PAUSE_S)
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=work, args=(number,)) for number in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    return found


@pytest.mark.slow  # a server is started 22 times
@pytest.mark.timeout(2 * TIMEOUT_S)
def test_curves_are_those_of_a_server_that_was_never_killed(tmp_path: Path) -> None:
    draw, is_over = random.Random(25), threading.Event()
    (tmp_path / "killed").mkdir()
    with servers(tmp_path / "killed") as own:

        def kill_and_start() -> None:
            try:
                for _ in range(NUM_KILLS):
                    if draw.random() < 0.75:  # else it may be killed while it starts
                        own.wait_until_ready()
                    time.sleep(draw.uniform(0, 1.0))
                    own.kill()
                    own.start()
            finally:
                is_over.set()

        killer = threading.Thread(target=kill_and_start)
        killer.start()
        found = curves(own.url, lambda num_steps: is_over.is_set() and num_steps >= 5)
        killer.join()
    (tmp_path / "whole").mkdir()
    wanted = max(map(len, found.values()))
    with servers(tmp_path / "whole") as own:
        expected = curves(own.url, lambda num_steps: num_steps >= wanted)
    for number, curve in found.items():
        assert curve == [pytest.approx(step, rel=1e-4, abs=1e-4) for step in expected[number][: len(curve)]]
