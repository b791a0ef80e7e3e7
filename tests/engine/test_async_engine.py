"""The engine in its own thread: streams, results, cancelling, many loops."""

import asyncio
import time

import pytest

from loraplex import MultiLoraModel
from loraplex.engine.async_engine import AsyncEngine
from loraplex.engine.config import EngineConfig
from loraplex.engine.engine import Engine
from loraplex.engine.request import Request
from loraplex.engine.sampling.params import SamplingParams
from loraplex.errors import AdapterNotFoundError, RequestError
from tests.engine.engines import answer, assert_same, make_model, prompts, write_adapters

CONFIG = EngineConfig(cache_bytes=2**22)
TIMEOUT_S = 120


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> MultiLoraModel:
    return make_model("llama", write_adapters("llama", tmp_path_factory.mktemp("llama")))


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, TIMEOUT_S))


async def wait_until_idle(engine: AsyncEngine) -> None:
    while engine.stats().num_running or engine.stats().num_waiting:
        await asyncio.sleep(0.01)


def test_streams_and_results_are_generates(model):
    asked = prompts((12, 30, 7))

    async def one(engine, prompted):
        request = prompted.request(max_tokens=6)
        deltas = [delta async for delta in engine.stream(request)]
        return tuple(token for delta in deltas for token in delta.token_ids), deltas[-1].finish_reason

    async def main():
        async with AsyncEngine(model, CONFIG) as engine:
            streams = await asyncio.gather(*(one(engine, prompted) for prompted in asked))
            results = await asyncio.gather(*(engine.generate(prompted.request(max_tokens=6)) for prompted in asked))
            return streams, results, engine.stats()

    streams, results, stats = run(main())
    for prompted, (tokens, reason), result in zip(asked, streams, results, strict=True):
        assert_same(model, prompted, result, answer(model, prompted, 6))
        assert (tokens, reason) == (result.token_ids, "length")
    assert stats.num_blocks_held == 0


def test_leaving_a_stream_cancels_its_request(model):
    async def main():
        async with AsyncEngine(model, CONFIG) as engine:
            stream = engine.stream(Request([1, 2, 3], adapters="0", sampling=SamplingParams(max_tokens=200)))
            async for _ in stream:
                break
            await stream.aclose()
            task = asyncio.create_task(engine.generate(Request([4, 5], sampling=SamplingParams(max_tokens=200))))
            while not engine.stats().num_running:  # 200 tokens take far longer than one turn of this loop
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await wait_until_idle(engine)
            return engine.stats()

    stats = run(main())
    assert (stats.num_blocks_held, stats.num_passes) == (0, 0)
    assert stats.counts.num_new_tokens < 390, "cancelled requests ran to their end"


def test_errors_reach_the_caller_and_others_go_on(model):
    async def main():
        async with AsyncEngine(model, CONFIG) as engine:
            good = asyncio.create_task(engine.generate(Request([1, 2, 3], sampling=SamplingParams(max_tokens=5))))
            with pytest.raises(AdapterNotFoundError, match="unknown"):
                await engine.generate(Request([1], adapters="unknown"))
            with pytest.raises(RequestError, match="prompt"):
                async for _ in engine.stream(Request([])):
                    pass
            return await good

    assert run(main()).finish_reason == "length"


def test_closing_ends_streams_and_refuses_new_ones(model, monkeypatch):
    step = Engine.step

    def slow_step(engine):
        time.sleep(0.02)  # the tiny model must not be done before it is closed
        return step(engine)

    monkeypatch.setattr(Engine, "step", slow_step)

    async def main():
        engine = AsyncEngine(model, CONFIG)
        stream = engine.stream(Request([1, 2, 3], sampling=SamplingParams(max_tokens=200)))
        first = await anext(stream)
        closing = asyncio.create_task(engine.close())
        rest = [delta async for delta in stream]
        await closing
        with pytest.raises(RequestError, match="closed"):
            await engine.generate(Request([1]))
        return first, rest

    first, rest = run(main())
    assert first.finish_reason is None
    assert rest[-1].finish_reason == "cancelled"


def test_adapters_are_replaced_while_requests_run(model, tmp_path):
    asked = [prompted for prompted in prompts((12,)) if prompted.adapters in (None, "1", "0:0.5+2:0.7")] * 4
    folder = write_adapters("llama", tmp_path)["2"]

    async def main():
        async with AsyncEngine(model, CONFIG) as engine:
            tasks = [asyncio.create_task(engine.generate(p.request(max_tokens=20))) for p in asked]
            for _ in range(6):
                await asyncio.to_thread(model.load_adapter, "extra", folder, replace=True)
                await engine.generate(Request([1, 2], adapters="extra", sampling=SamplingParams(max_tokens=2)))
            model.unload("extra")
            return await asyncio.gather(*tasks)

    for prompted, result in zip(asked, run(main()), strict=True):
        assert_same(model, prompted, result, answer(model, prompted, 20))
