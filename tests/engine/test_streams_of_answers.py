"""Streams of several answers: each has all its tokens and its end, also when all end in one step."""

import asyncio
from collections import defaultdict

import pytest

from loraplex import MultiLoraModel
from loraplex.engine.async_engine import AsyncEngine
from loraplex.engine.config import EngineConfig
from loraplex.engine.engine import Engine
from loraplex.engine.request import Delta, Request, RequestResult
from loraplex.engine.sampling.params import SamplingParams
from loraplex.engine.sampling.sampler import Sampler
from tests.tiny_models import tiny_model

CONFIG = EngineConfig(cache_bytes=2**22)
TIMEOUT_S = 120


@pytest.fixture(scope="module")
def model() -> MultiLoraModel:
    return MultiLoraModel(tiny_model("llama"))


def streamed(model: MultiLoraModel, requests: list[Request], config: EngineConfig = CONFIG) -> list[list[Delta]]:
    async def one(engine: AsyncEngine, request: Request) -> list[Delta]:
        return [delta async for delta in engine.stream(request)]

    async def main() -> list[list[Delta]]:
        async with AsyncEngine(model, config) as engine:
            return await asyncio.gather(*(one(engine, request) for request in requests))

    return asyncio.run(asyncio.wait_for(main(), TIMEOUT_S))


def assert_whole(deltas: list[Delta], result: RequestResult) -> None:
    """The deltas of each answer are its completion, and its last one alone tells its end."""
    tokens, ends = defaultdict(tuple), {}
    for delta in deltas:
        assert delta.index not in ends, "a delta came behind the end of its answer"
        tokens[delta.index] += delta.token_ids
        if delta.finish_reason is not None:
            ends[delta.index] = delta.finish_reason
    assert dict(tokens) == {completion.index: completion.token_ids for completion in result.completions}
    assert ends == {completion.index: completion.finish_reason for completion in result.completions}


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_answers_that_end_in_one_step_are_streamed_whole(model, n):
    request = Request([9, 10, 11], sampling=SamplingParams(max_tokens=3, n=n))
    (deltas,) = streamed(model, [request])
    with Engine(model, CONFIG) as engine:
        (result,) = engine.generate([request])
    assert_whole(deltas, result)
    assert all(len(completion.token_ids) == 3 for completion in result.completions)


def test_answers_that_end_in_different_steps_are_streamed_whole(model):
    sampling = SamplingParams(max_tokens=12, n=4, temperature=2.0, seed=5, stop_token_ids=tuple(range(0, 128, 9)))
    requests = [Request([20 + i, 3, 4], sampling=sampling) for i in range(3)]
    all_deltas = streamed(model, requests)
    with Engine(model, CONFIG) as engine:
        results = engine.generate(requests)
    for deltas, result in zip(all_deltas, results, strict=True):
        assert_whole(deltas, result)
    assert len({len(completion.token_ids) for result in results for completion in result.completions}) > 2


def test_more_answers_than_places_are_streamed_whole(model):
    config = EngineConfig(cache_bytes=2**22, max_running=2)
    request = Request([9, 10, 11], sampling=SamplingParams(max_tokens=4, n=5, temperature=1.0, seed=1))
    (deltas,) = streamed(model, [request], config)
    with Engine(model, CONFIG) as engine:
        (result,) = engine.generate([request])
    assert_whole(deltas, result)


def test_an_answer_that_fails_does_not_shorten_the_others(model, monkeypatch):
    """Answer 1 fails at its second token; the other answers of its request and other requests go on."""
    failing = Request([9, 10, 11], sampling=SamplingParams(max_tokens=4, n=3, temperature=1.0, seed=1))
    other = Request([12, 13], sampling=SamplingParams(max_tokens=6, n=2, temperature=1.0, seed=2))
    with Engine(model, CONFIG) as engine:
        good, other_result = engine.generate([failing, other])
    choose = Sampler.choose

    def fails(sampler: Sampler, logits: object) -> int:
        if sampler._generator.initial_seed() == 2 and sampler.sampling.max_tokens == 4 and sampler._counts.total() == 1:
            raise ZeroDivisionError("a sampler that fails")
        return choose(sampler, logits)

    monkeypatch.setattr(Sampler, "choose", fails)
    deltas, other_deltas = streamed(model, [failing, other])
    assert_whole(other_deltas, other_result)
    by_index = {index: [delta for delta in deltas if delta.index == index] for index in range(3)}
    for index in (0, 2):
        tokens = tuple(token for delta in by_index[index] for token in delta.token_ids)
        assert (tokens, by_index[index][-1].finish_reason) == (good.completions[index].token_ids, "length")
    assert [delta.finish_reason for delta in by_index[1]] == [None, "error"]
    assert "a sampler that fails" in str(by_index[1][-1].error)
