"""Compute threads beside the engine's: none stay where nobody computes."""

import asyncio
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from loraplex import EngineConfig, MultiLoraModel, Request, SamplingParams
from loraplex.engine.async_engine import AsyncEngine
from loraplex.threads import compute_alone, computing_alone, give_back_workers, stand_beside
from tests.tiny_models import random_peft_adapter, tiny_model

TASKS = Path("/proc/self/task")
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or "/libgomp" not in Path("/proc/self/maps").read_text(), reason="needs GNU's OpenMP"
)


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
    give_back_workers()


def compute() -> None:
    """What torch computes in parallel."""
    torch.ones(1 << 20).add_(1)


def in_thread(work: Callable[[], object]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def num_tasks() -> int:
    return len(list(TASKS.iterdir()))


def test_workers_are_given_back_and_made_again() -> None:
    seen = []

    def work() -> None:
        for step in (lambda: None, compute, give_back_workers, compute):
            step()
            seen.append(num_tasks())

    in_thread(work)
    workers = torch.get_num_threads() - 1
    assert [count - seen[0] for count in seen] == [0, workers, 0, workers]


def test_a_thread_that_computes_alone_has_no_workers() -> None:
    seen = []

    def work() -> None:
        compute_alone()
        seen.append(num_tasks())
        for step in (compute, lambda: torch.ones(300, 300) @ torch.ones(300, 300)):
            step()
            seen.append(num_tasks())

    def for_a_while() -> None:
        before = torch.get_num_threads()
        with computing_alone():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == before

    in_thread(work)
    assert len(set(seen)) == 1
    in_thread(for_a_while)
    assert torch.get_num_threads() > 1, "other threads keep their number"


def test_a_thread_beside_gives_way() -> None:
    found = []

    def work() -> None:
        stand_beside()
        found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    in_thread(work)
    assert found[0] > os.getpriority(os.PRIO_PROCESS, os.getpid())


def test_the_engine_computes_alone_whoever_loads_adapters(tmp_path: Path) -> None:
    """Workers of the thread that loaded the model, or that loads an adapter, would halve the engine's speed."""
    torch.ones(1 << 20).add_(1)  # as loading a model does
    folder = random_peft_adapter(tiny_model("llama"), tmp_path / "a", targets=("q_proj",), r=2)
    model = MultiLoraModel(tiny_model("llama"))

    def load() -> None:
        compute()
        model.load_adapter("a", folder, replace=True)

    async def run() -> None:
        async with AsyncEngine(model, EngineConfig()) as engine:
            request = Request([1, 2, 3], sampling=SamplingParams(max_tokens=2))
            await engine.generate(request)
            load()  # in this thread
            await engine.generate(request)
            await asyncio.to_thread(compute_alone)  # the executor's thread itself is there
            before = num_tasks()
            compute()
            load()
            await asyncio.to_thread(load)
            await engine.generate(request)
            assert num_tasks() <= before

    asyncio.run(run())
