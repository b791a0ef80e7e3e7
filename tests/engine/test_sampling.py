"""Sampling against transformers' logits processors, stops, penalties and seeds."""

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from loraplex.engine.sampling.logprobs import token_logprobs
from loraplex.engine.sampling.params import SamplingParams
from loraplex.engine.sampling.sampler import Sampler, draw, largest
from loraplex.errors import EngineError, RequestError

VOCAB = 50
PROMPT = (3, 4, 4, 9)
OPTIONS = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.5, "top_p": 0.6},
    {"temperature": 0.9, "min_p": 0.2},
    {"temperature": 1.2, "top_k": 20, "top_p": 0.8, "min_p": 0.05},
]


def logits(seed: int = 0) -> torch.Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * 2


def transformers_probabilities(values: torch.Tensor, options: dict) -> torch.Tensor:
    warpers = LogitsProcessorList([TemperatureLogitsWarper(options["temperature"])])
    if "top_k" in options:
        warpers.append(TopKLogitsWarper(options["top_k"]))
    if "top_p" in options:
        warpers.append(TopPLogitsWarper(options["top_p"]))
    if "min_p" in options:
        warpers.append(MinPLogitsWarper(options["min_p"]))
    return torch.softmax(warpers(torch.tensor([PROMPT]), values[None].clone()), dim=-1)[0]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_tokens_are_drawn_with_transformers_probabilities(options):
    values, sampling = logits(), SamplingParams(**options)
    expected = transformers_probabilities(values, options)
    generator = torch.Generator().manual_seed(1)
    num_draws = 4000
    counts = torch.zeros(VOCAB)
    for _ in range(num_draws):
        counts[draw(values, sampling, generator)] += 1
    assert not counts[expected == 0].any(), "a token was drawn that the filters exclude"
    error = (counts / num_draws - expected).abs()
    assert (error < 4.5 * (expected * (1 - expected) / num_draws).sqrt() + 1e-3).all(), f"off by {error.max():.3f}"


def test_repetition_penalty_is_transformers():
    answer = [7, 7, 9]
    sampler = Sampler(SamplingParams(repetition_penalty=1.7), PROMPT, (), seed=0)
    for token in answer:
        sampler.took(token)
    for seed in range(20):
        values = logits(seed)
        processed = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([[*PROMPT, *answer]]), values[None].clone())
        assert sampler.choose(values) == int(processed.argmax())


def test_presence_and_frequency_penalties_count_the_answer_only():
    values = torch.zeros(VOCAB)
    values[3], values[7], values[8] = 1.05, 1.3, 1.0  # 3 is in the prompt
    sampler = Sampler(SamplingParams(presence_penalty=0.1, frequency_penalty=0.2), PROMPT, (), seed=0)
    chosen = []
    for _ in range(4):
        chosen.append(sampler.choose(values))
        sampler.took(chosen[-1])
    assert chosen == [7, 3, 8, 7]  # 1.3; then 7 has 1.0, 3 has 1.05; then 3 has 0.75, 8 before 7 by its id; then 7


def test_bias_moves_a_token_up_and_forbids_another():
    values = logits()
    best, worst = int(values.argmax()), int(values.argmin())
    sampling = SamplingParams(logit_bias={worst: 100.0})
    assert Sampler(sampling, PROMPT, (), seed=0).choose(values) == worst
    forbidden = Sampler(SamplingParams(logit_bias={best: float("-inf")}), PROMPT, (), seed=0)
    assert forbidden.choose(values) == int(values.topk(2).indices[1])


def test_end_tokens_wait_for_min_tokens():
    values = logits()
    best, second = values.topk(2).indices.tolist()
    sampler = Sampler(SamplingParams(min_tokens=2), PROMPT, (best,), seed=0)
    for expected in (second, second, best):
        assert sampler.choose(values) == expected
        sampler.took(expected)


def test_logprobs_are_the_models_own():
    values = logits()
    expected = torch.log_softmax(values, dim=-1)
    entry = token_logprobs(values, token=11, num_top=3)
    assert entry.logprob == pytest.approx(float(expected[11]))
    assert entry.rank == int((expected > expected[11]).sum()) + 1
    assert [token for token, _ in entry.top] == expected.topk(3).indices.tolist()
    assert [value for _, value in entry.top] == pytest.approx(expected.topk(3).values.tolist())


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 0},
        {"max_tokens": True},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"min_p": 2},
        {"repetition_penalty": 0},
        {"presence_penalty": float("inf")},
        {"logit_bias": {3: float("nan")}},
        {"logit_bias": {-3: 1.0}},
        {"stop": ("",)},
        {"stop_token_ids": (1.5,)},
        {"n": 0},
        {"seed": -1},
        {"logprobs": -1},
        {"json_schema": 3},
    ],
    ids=str,
)
def test_options_that_cant_be_honoured_are_refused(options):
    with pytest.raises(RequestError, match=str(next(iter(options))).split("_")[0]):
        SamplingParams(**options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [7, 256, 512, 1000, 1025])
def test_the_largest_logit_is_argmaxs_at_ties_and_nan_too(vocab: int, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(vocab)
    values = torch.randint(-3, 4, (40, vocab), generator=draw).to(dtype)  # many ties
    values[1] = float("-inf")
    values[2, vocab // 2] = float("nan")
    values[3, -1] = 9
    values[4, 0] = 9
    assert torch.equal(largest(values), values.argmax(dim=-1))
    assert torch.equal(largest(values[:0]), torch.empty(0, dtype=torch.int64))


@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}], ids=str)
@pytest.mark.parametrize("temperature", [1e-30, 1e-300])
def test_the_smallest_temperatures_give_the_greedy_token(temperature, filters):
    sampler = Sampler(SamplingParams(temperature=temperature, **filters), PROMPT, (), seed=0)
    for seed in range(10):
        values = logits(seed)
        assert sampler.choose(values) == int(values.argmax())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_largest_penalties_and_biases_still_order_tokens(temperature):
    values = torch.zeros(VOCAB)
    values[3:5] = 1.0
    sampling = {"repetition_penalty": 1e-38, "logit_bias": {4: 3e38, 5: -torch.inf}, "presence_penalty": -3e38}
    sampler = Sampler(SamplingParams(temperature=temperature, **sampling), PROMPT, (), seed=0)
    for _ in range(3):
        assert sampler.choose(values) == 4
        sampler.took(4)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_request_whose_options_leave_no_token_is_told(temperature):
    nothing = SamplingParams(temperature=temperature, logit_bias=dict.fromkeys(range(VOCAB), -torch.inf))
    with pytest.raises(RequestError, match="logit_bias"):
        Sampler(nothing, PROMPT, (), seed=0).choose(logits())
    ends = {token: -torch.inf for token in range(VOCAB) if token != 7}
    only_an_end = SamplingParams(temperature=temperature, logit_bias=ends, min_tokens=2)
    with pytest.raises(RequestError, match="min_tokens"):
        Sampler(only_an_end, PROMPT, (7,), seed=0).choose(logits())


@pytest.mark.parametrize("options", [{"temperature": 1.0}, {"presence_penalty": 1.0}], ids=str)
def test_logits_that_are_nan_are_told(options):
    values = logits()
    values[3] = torch.nan
    with pytest.raises(EngineError, match="NaN"):
        Sampler(SamplingParams(**options), PROMPT, (), seed=0).choose(values)
