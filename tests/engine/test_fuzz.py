"""Requests of all kinds at random times, with cancels, bad arguments and adapters that come and go."""

import random
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from loraplex import MultiLoraModel
from loraplex.engine.config import EngineConfig
from loraplex.engine.engine import Engine
from loraplex.engine.request import Request, RequestResult
from loraplex.engine.sampling.params import SamplingParams
from loraplex.errors import AdapterError, LoraplexError
from loraplex.residual.capture import CaptureRequest
from loraplex.residual.modules import FunctionResidual, ResidualContext
from loraplex.residual.registry import AttentionRequest
from loraplex.residual.steering import Steering
from tests.engine.engines import (
    CHOICES,
    INVOCATION,
    LINKED_CHOICES,
    Prompted,
    add_residuals,
    answer,
    assert_same,
    make_model,
    write_adapters,
)
from tests.tiny_models import VOCAB_SIZE

BAD = (
    Request([]),
    Request([VOCAB_SIZE + 3]),
    Request([1], adapters="unknown"),
    Request([1], adapters="0:x"),
    Request([1], adapters="0+0"),
    Request([1] * 300),
    Request([1], sampling=SamplingParams(stop_token_ids=(10_000,))),
    Request([1], steering=(Steering(spans=((0, 2),), strength=2),)),
    Request([1], capture=CaptureRequest(budget_bytes=1)),
)
CAPTURES = (
    CaptureRequest(),
    CaptureRequest(queries="generated", reduce="mean"),
    CaptureRequest(queries=5, layers=(1,)),
)
LONGEST_FOR_FUNCTION = 30  # tokens; the function "fails" raises behind them
ANSWER_TOKENS = (1, 3, 8, 14)


@dataclass
class Traffic:
    """Random requests, some of which share prefixes, and what became of them."""

    model: MultiLoraModel
    engine: Engine
    draws: random.Random
    prefixes: list[list[int]] = field(default_factory=list)
    running: dict[str, tuple[Prompted, Request]] = field(default_factory=dict)
    finished: list[tuple[Prompted, Request, RequestResult]] = field(default_factory=list)

    def prompted(self) -> Prompted:
        tokens = [self.draws.randrange(7, VOCAB_SIZE) for _ in range(self.draws.choice((1, 2, 9, 16, 17, 40)))]
        if self.prefixes and self.draws.random() < 0.5:
            tokens = self.draws.choice(self.prefixes) + tokens
        if self.draws.random() < 0.3:
            self.prefixes = [*self.prefixes[-3:], tokens[:64]]
        choice = self.draws.choice((*CHOICES, *LINKED_CHOICES, "0+fails"))
        if choice == "alora" and self.draws.random() < 0.8:
            place = self.draws.randrange(len(tokens) + 1)
            tokens[place:place] = INVOCATION
        return Prompted(tuple(tokens[:120]), choice)

    def add(self) -> None:
        prompted, num_tokens = self.prompted(), self.draws.choice(ANSWER_TOKENS)
        sampled = {"temperature": 1.0} if self.draws.random() < 0.2 else {}
        priority = self.draws.choice((0, 0, 0, 1))
        sampling = SamplingParams(max_tokens=num_tokens, n=self.draws.choice((1, 1, 1, 2)), **sampled)
        asked = self.asked(len(prompted.prompt), sampling.n)
        request = Request(prompted.prompt, adapters=prompted.adapters, sampling=sampling, priority=priority, **asked)
        self.running[self.engine.add_request(request)] = prompted, request

    def asked(self, num_prompt: int, num_answers: int) -> dict[str, object]:
        """What some requests ask for besides tokens."""
        asked: dict[str, object] = {"cache_salt": self.draws.choice(("", "", "", "a"))}
        if self.draws.random() < 0.15 and num_answers == 1:
            asked["capture"] = self.draws.choice(CAPTURES)
        if self.draws.random() < 0.15:
            start = self.draws.randrange(num_prompt)
            spans = ((start, self.draws.randrange(start, num_prompt) + 1),)
            asked["steering"] = (Steering(spans=spans, strength=self.draws.choice((0.1, 4.0))),)
        if self.draws.random() < 0.15:
            asked["return_scalings"] = True
        return asked

    def disturb(self) -> None:
        """Something goes wrong, or comes and goes."""
        kind = self.draws.randrange(4)
        if kind == 0:
            with pytest.raises(LoraplexError):
                self.engine.add_request(self.draws.choice(BAD))
        elif kind == 1 and self.running:
            self.engine.cancel(self.draws.choice(list(self.running)))
        elif kind == 2:
            self.model.load_adapter("passing", self.model.store.version("2").folder, replace=True)
        elif "passing" in self.model.names():
            self.engine.add_request(Request([3, 4, 5], adapters="passing", sampling=SamplingParams(max_tokens=4)), None)
            self.model.unload("passing")

    def step(self) -> None:
        for delta in self.engine.step():
            if delta.finish_reason is None:
                continue
            result = self.engine.pop_result(delta.request_id)
            if result is not None and delta.request_id in self.running:
                self.finished.append((*self.running.pop(delta.request_id), result))


def run_traffic(model: MultiLoraModel, config: EngineConfig, num_requests: int, seed: int) -> Traffic:
    leases = sum(state.num_leases for state in model.adapters())
    with Engine(model, config) as engine:
        traffic = Traffic(model, engine, random.Random(seed))
        num_left = num_requests
        while num_left or engine.has_work:
            for _ in range(min(num_left, traffic.draws.choice((0, 0, 0, 1, 2)))):
                traffic.add()
                num_left -= 1
            if num_left and traffic.draws.random() < 0.2:
                traffic.disturb()
            traffic.step()
        stats = engine.stats()
    assert (stats.num_blocks_held, stats.num_passes, stats.num_running, stats.num_waiting) == (0, 0, 0, 0)
    assert sum(state.num_leases for state in model.adapters()) == leases
    return traffic


def check_answers(traffic: Traffic, num_requests: int) -> int:
    """Every greedy answer that ran to its end is `generate`'s; returns how many there were."""
    num_checked = 0
    assert len(traffic.finished) == num_requests
    for prompted, request, result in traffic.finished:
        reasons = {completion.finish_reason for completion in result.completions}
        if may_fail(prompted, request):
            assert reasons <= {"error", "cancelled"}, f"{prompted.adapters}: a function went on after its failure"
            assert isinstance(result.error, AdapterError) or "cancelled" in reasons
            continue
        assert reasons <= {"length", "cancelled"}, f"{prompted.adapters}: {result.error}"
        if reasons == {"length"} and request.sampling.temperature == 0:
            num_checked += 1
            check_answer(traffic.model, prompted, request, result)
    return num_checked


def may_fail(prompted: Prompted, request: Request) -> bool:
    """Whether the function "fails" sees more tokens than it can take; the last one of an answer isn't run."""
    num_run = len(prompted.prompt) + request.sampling.max_tokens - 1
    return "fails" in str(prompted.adapters) and num_run > LONGEST_FOR_FUNCTION


def check_answer(model: MultiLoraModel, prompted: Prompted, request: Request, result: RequestResult) -> None:
    """Tokens, capture and scalings are those of `generate`."""
    attention = AttentionRequest(capture=[request.capture], steering=[request.steering])
    expected = answer(model, prompted, request.sampling.max_tokens, attention)
    assert_same(model, prompted, result, expected, AttentionRequest(steering=[request.steering]))
    assert len({completion.token_ids for completion in result.completions}) == 1
    assert (result.scalings is not None) == request.return_scalings
    if result.token_ids != expected:  # a tie
        return
    if request.capture is not None:
        assert np.abs(result.capture.weights - attention.captures[0].weights).max() <= 1e-5
    if request.return_scalings and not request.steering:
        ids = torch.tensor([prompted.prompt])
        options = {"max_new_tokens": len(expected), "do_sample": False, "return_scalings": True}
        _, (scalings,) = model.generate(ids, adapters=[prompted.adapters], **options)
        assert len(result.scalings) == len(scalings)
        for found, row in zip(result.scalings, scalings, strict=True):
            assert torch.allclose(found.values, row.values, atol=1e-4)


def fails(hidden: torch.Tensor, attention: torch.Tensor, context: ResidualContext) -> torch.Tensor:
    if context.first_position + len(hidden) > LONGEST_FOR_FUNCTION:
        raise ValueError("too long")
    return hidden * 0.1


CONFIGS = {
    "roomy": EngineConfig(cache_bytes=2**23, max_length=150),
    "tight": EngineConfig(
        cache_bytes=50 * 2**13, max_length=150, max_running=6, max_step_tokens=40, fair_tokens=16, block_tokens=8
    ),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("num_requests", [30, pytest.param(250, marks=pytest.mark.slow)])
def test_random_traffic_is_answered_right_and_leaves_nothing(config, num_requests, tmp_path):
    model = add_residuals(make_model("llama", write_adapters("llama", tmp_path)))
    model.load_residual("fails", FunctionResidual(function=fails))
    traffic = run_traffic(model, config, num_requests, seed=num_requests)
    assert check_answers(traffic, num_requests) > num_requests // 2
