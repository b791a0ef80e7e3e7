"""Whatever raises in the engine's thread, every request ends: right, or with an error; and the next one is right."""

import asyncio
import gc
import logging
from collections.abc import Callable
from types import CodeType

import pytest

from loraplex import MultiLoraModel
from loraplex.engine.async_engine import AsyncEngine
from loraplex.engine.config import EngineConfig
from loraplex.engine.request import Delta, Request
from loraplex.engine.sampling.params import SamplingParams
from loraplex.errors import EngineError
from loraplex.residual.capture import CaptureRequest
from tests.engine.engines import add_residuals, make_model, write_adapters
from tests.engine.fault_injection import Injector, name
from tests.training.tiny_jobs import tiny_tokenizer

CONFIG = EngineConfig(cache_bytes=2**21, max_restarts=10**6)
TIMEOUT_S = 60
NEXT = Request([1, 2, 3], adapters="0", sampling=SamplingParams(max_tokens=3))
# One of each kind that takes its own way through a step.
REQUESTS = (
    Request([9, 10, 11], sampling=SamplingParams(max_tokens=5, n=2, temperature=1.0, seed=1, logprobs=2)),
    Request(
        "The protein", adapters="0:0.5+2:0.7", sampling=SamplingParams(max_tokens=6, stop="xyz", prompt_logprobs=1)
    ),
    Request(list(range(20, 40)), adapters="science", sampling=SamplingParams(max_tokens=6), return_scalings=True),
    Request([5, 6, 7], adapters="alora+ra", sampling=SamplingParams(max_tokens=6), capture=CaptureRequest()),
    Request(
        list(range(30, 50)),
        adapters="second",
        sampling=SamplingParams(max_tokens=4, top_p=0.9, temperature=1.0, seed=3, frequency_penalty=0.5),
    ),
)
Outcome = tuple[tuple[int, ...], ...] | EngineError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> MultiLoraModel:
    model = add_residuals(make_model("llama", write_adapters("llama", tmp_path_factory.mktemp("llama"))))
    model.__dict__["tokenizer"] = tiny_tokenizer()
    return model


@pytest.fixture
def injector(monkeypatch: pytest.MonkeyPatch) -> Injector:
    logging.getLogger("loraplex.engine").setLevel(logging.CRITICAL + 1)
    injector = Injector()
    injector.install(monkeypatch)
    return injector


async def outcome(engine: AsyncEngine, request: Request, on_delta: Callable[[Delta], None] | None = None) -> Outcome:
    """The tokens of a request's answers as they were streamed, or the error that it ended with."""
    tokens: list[tuple[int, ...]] = [()] * request.sampling.n
    ended = 0
    try:
        async for delta in engine.stream(request):
            if on_delta is not None:
                on_delta(delta)
            if delta.finish_reason == "error":
                assert delta.error is not None
                return delta.error
            tokens[delta.index] += delta.token_ids
            ended += delta.finish_reason in ("stop", "length")
    except EngineError as error:
        return error
    assert ended == request.sampling.n, f"{request}: ended without its end"
    return tuple(tokens)


async def outcomes(engine: AsyncEngine, injector: Injector, target: CodeType | None, *, midway: bool) -> list[Outcome]:
    """Of all requests at once, with an error at a call of `target`: the first, or the first once all have begun."""
    begun: set[int] = set()

    def watch(place: int) -> Callable[[Delta], None]:
        def note(delta: Delta) -> None:
            begun.add(place)
            if midway and target is not None and len(begun) == len(REQUESTS) and not injector.has_raised:
                injector.target = target

        return note

    injector.has_raised = False
    if target is not None and not midway:
        injector.arm(target)
    running = [outcome(engine, request, watch(place)) for place, request in enumerate(REQUESTS)]
    found = await asyncio.wait_for(asyncio.gather(*running), TIMEOUT_S)
    injector.disarm()
    return found


async def until_idle(engine: AsyncEngine) -> None:
    """Until nothing runs, and what nobody waits for any more has gone too."""
    while engine.is_restarting or engine._engine.has_work or engine._engine._tracker._results:
        await asyncio.sleep(0.001)


async def sweep(model: MultiLoraModel, injector: Injector, chosen: slice) -> dict[str, int]:
    """An error in each of the chosen functions; returns how often which kind of end came."""
    counts = {"right": 0, "error": 0, "raised": 0, "restarts": 0}
    async with AsyncEngine(model, CONFIG) as engine:
        injector.seen.clear()
        expected = await outcomes(engine, injector, None, midway=False)
        expected_next = await outcome(engine, NEXT)
        await until_idle(engine)
        assert not any(isinstance(end, EngineError) for end in expected)
        targets = list(injector.seen)[chosen]
        for target in targets:
            for midway in (False, True):
                where = f"{name(target)}{' midway' if midway else ''}"
                ends = await outcomes(engine, injector, target, midway=midway)
                for request, end, right in zip(REQUESTS, ends, expected, strict=True):
                    counts["error" if isinstance(end, EngineError) else "right"] += 1
                    assert isinstance(end, EngineError) or end == right, f"{where}: {request}"
                counts["raised"] += injector.has_raised
                assert await asyncio.wait_for(outcome(engine, NEXT), TIMEOUT_S) == expected_next, where
                await asyncio.wait_for(until_idle(engine), TIMEOUT_S)
                stats = engine.stats()
                assert (stats.num_blocks_held, stats.num_passes) == (0, 0), where
                assert all(state.num_leases == 0 for state in model.adapters()), where
                assert engine._collectors == {}, where
        counts["restarts"] = engine.faults.count
        assert engine.is_running
    return counts


def hooks(model: MultiLoraModel) -> list[tuple[int, int, object]]:
    """What is joined to the model's modules."""
    return [
        (len(module._forward_hooks), len(module._forward_pre_hooks), module.__dict__.get("forward"))
        for module in model.base.modules()
    ]


@pytest.mark.parametrize(
    "chosen", [slice(0, None, 40), pytest.param(slice(None), marks=[pytest.mark.slow, pytest.mark.timeout(3000)])]
)
def test_an_error_in_any_function_of_a_step_leaves_no_request_waiting(model, injector, chosen):
    before, frozen = (hooks(model), model.base.config._attn_implementation), gc.get_freeze_count()
    counts = asyncio.run(sweep(model, injector, chosen))
    print(counts)
    assert counts["raised"] > 5
    assert counts["restarts"] > 0
    assert counts["right"] > 0
    assert (hooks(model), model.base.config._attn_implementation) == before
    assert gc.get_freeze_count() == frozen
