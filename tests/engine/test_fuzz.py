"""Requests of all kinds at random times, with cancels, bad arguments and adapters that come and go."""

import random
from dataclasses import dataclass, field

import pytest

from loraplex import MultiLoraModel
from loraplex.engine.config import EngineConfig
from loraplex.engine.engine import Engine
from loraplex.engine.request import Request, RequestResult
from loraplex.engine.sampling import SamplingParams
from loraplex.errors import LoraplexError
from tests.engine.engines import CHOICES, INVOCATION, Prompted, answer, assert_same, make_model, write_adapters
from tests.tiny_models import VOCAB_SIZE

BAD = (
    Request([]),
    Request([VOCAB_SIZE + 3]),
    Request([1], adapters="unknown"),
    Request([1], adapters="0:x"),
    Request([1], adapters="0+0"),
    Request([1] * 300),
    Request([1], sampling=SamplingParams(stop_token_ids=(10_000,))),
)
ANSWER_TOKENS = (1, 3, 8, 14)


@dataclass
class Traffic:
    """Random requests, some of which share prefixes, and what became of them."""

    model: MultiLoraModel
    engine: Engine
    draws: random.Random
    prefixes: list[list[int]] = field(default_factory=list)
    running: dict[str, tuple[Prompted, SamplingParams]] = field(default_factory=dict)
    finished: list[tuple[Prompted, SamplingParams, RequestResult]] = field(default_factory=list)

    def prompted(self) -> Prompted:
        tokens = [self.draws.randrange(7, VOCAB_SIZE) for _ in range(self.draws.choice((1, 2, 9, 16, 17, 40)))]
        if self.prefixes and self.draws.random() < 0.5:
            tokens = self.draws.choice(self.prefixes) + tokens
        if self.draws.random() < 0.3:
            self.prefixes = [*self.prefixes[-3:], tokens[:64]]
        choice = self.draws.choice(CHOICES)
        if choice == "alora" and self.draws.random() < 0.8:
            place = self.draws.randrange(len(tokens) + 1)
            tokens[place:place] = INVOCATION
        return Prompted(tuple(tokens[:120]), choice)

    def add(self) -> None:
        prompted, num_tokens = self.prompted(), self.draws.choice(ANSWER_TOKENS)
        sampled = {"temperature": 1.0} if self.draws.random() < 0.2 else {}
        priority = self.draws.choice((0, 0, 0, 1))
        sampling = SamplingParams(max_tokens=num_tokens, n=self.draws.choice((1, 1, 1, 2)), **sampled)
        request = Request(prompted.prompt, adapters=prompted.adapters, sampling=sampling, priority=priority)
        self.running[self.engine.add_request(request)] = prompted, sampling

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
    assert (stats.num_blocks_held, stats.num_tracks, stats.num_running, stats.num_waiting) == (0, 0, 0, 0)
    assert sum(state.num_leases for state in model.adapters()) == leases
    return traffic


def check_answers(traffic: Traffic, num_requests: int) -> int:
    """Every greedy answer that ran to its end is `generate`'s; returns how many there were."""
    num_checked = 0
    assert len(traffic.finished) == num_requests
    for prompted, sampling, result in traffic.finished:
        reasons = {completion.finish_reason for completion in result.completions}
        assert reasons <= {"length", "cancelled"}, f"{prompted.adapters}: {result.error}"
        if reasons == {"length"} and sampling.temperature == 0:
            num_checked += 1
            expected = answer(traffic.model, prompted, sampling.max_tokens)
            assert_same(traffic.model, prompted, result, expected)
            assert len({completion.token_ids for completion in result.completions}) == 1
    return num_checked


CONFIGS = {
    "roomy": EngineConfig(cache_bytes=2**23, max_length=150),
    "tight": EngineConfig(
        cache_bytes=50 * 2**13, max_length=150, max_running=6, max_step_tokens=40, fair_tokens=16, block_tokens=8
    ),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("num_requests", [30, pytest.param(250, marks=pytest.mark.slow)])
def test_random_traffic_is_answered_right_and_leaves_nothing(config, num_requests, tmp_path):
    model = make_model("llama", write_adapters("llama", tmp_path))
    traffic = run_traffic(model, config, num_requests, seed=num_requests)
    assert check_answers(traffic, num_requests) > num_requests // 2
