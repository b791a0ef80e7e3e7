"""Logits that 16 bits can't tell apart: the float32 sums choose, everywhere and the same."""

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from loraplex import MultiLoraModel, XLoraConfig
from loraplex.engine.config import EngineConfig
from loraplex.engine.engine import Engine
from loraplex.engine.request import Request
from loraplex.engine.sampling.logprobs import token_logprobs, top_tokens
from loraplex.engine.sampling.params import SamplingParams
from loraplex.engine.sampling.sampler import largest
from loraplex.xlora.two_pass.speculation import SpeculativeStep
from loraplex.xlora.two_pass.two_pass import TwoPass
from tests.engine.near_ties import Seen, near_tied, output_layer_seen
from tests.tiny_models import random_peft_adapter

# As they are, capped (Gemma 2) and scaled (Cohere, Granite) behind the output layer.
MODELS = ("llama", "gemma2", "cohere2", "granite")
PROMPTS = ((5, 9, 33, 71), (3, 8, 99, 1), (44, 2, 17, 60))
NUM_TOKENS = 10
GREEDY = {"max_new_tokens": NUM_TOKENS, "do_sample": False}


@pytest.fixture(params=MODELS)
def model(request) -> MultiLoraModel:
    return MultiLoraModel(near_tied(request.param))


def weight_of(model: MultiLoraModel) -> Tensor:
    return model.base.get_output_embeddings().weight


def assert_chosen(seen: list[Seen], weight: Tensor, chosen: list[list[int]]) -> int:
    """In every call of the output layer, `chosen` are the largest float64 logits, in any order.

    Returns how many of them the rounded logits would have missed.
    """
    num_missed = 0
    for call, tokens in zip(seen, chosen, strict=True):
        expected = call.expected(weight)
        assert sorted(tokens) == sorted(expected.argmax(dim=-1).tolist())
        num_missed += int((expected.to(weight.dtype).argmax(dim=-1) != expected.argmax(dim=-1)).sum())
    return num_missed


@pytest.mark.parametrize("fast_decode", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_generate_chooses_by_float32_logits(dtype, fast_decode):
    model = MultiLoraModel(near_tied("llama", dtype), fast_decode=fast_decode)
    ids = torch.tensor(PROMPTS)
    with output_layer_seen(model.base) as seen:
        out = model.generate(ids, torch.ones_like(ids), **GREEDY, packed=False)
    assert assert_chosen(seen, weight_of(model), out[:, ids.shape[1] :].t().tolist()) > 2


def test_generate_and_engine_choose_the_same_behind_caps_and_scales(model):
    num_missed = 0
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        with output_layer_seen(model.base) as seen:
            out = model.generate(ids, torch.ones_like(ids), **GREEDY, packed=False)
        num_missed += assert_chosen(seen, weight_of(model), out[:, ids.shape[1] :].t().tolist())
        with Engine(model, EngineConfig(cache_bytes=2**22)) as engine, output_layer_seen(model.base) as seen:
            (result,) = engine.generate([Request(prompt, sampling=SamplingParams(max_tokens=NUM_TOKENS))])
        num_missed += assert_chosen(seen, weight_of(model), [[token] for token in result.token_ids])
    with Engine(model, EngineConfig(cache_bytes=2**22)) as engine, output_layer_seen(model.base) as seen:
        requests = [Request(prompt, sampling=SamplingParams(max_tokens=NUM_TOKENS)) for prompt in PROMPTS]
        results = engine.generate(requests)
    together = [list(tokens) for tokens in zip(*(result.token_ids for result in results), strict=True)]
    assert num_missed + assert_chosen(seen, weight_of(model), together) > 5


def test_greedy_top_and_logprobs_agree(model):
    sampling = SamplingParams(max_tokens=NUM_TOKENS, logprobs=3, prompt_logprobs=2)
    likeliest = SamplingParams(max_tokens=NUM_TOKENS, temperature=1.0, top_k=1)
    with Engine(model, EngineConfig(cache_bytes=2**22)) as engine:
        results = engine.generate([Request(prompt, sampling=sampling) for prompt in PROMPTS])
        drawn = engine.generate([Request(prompt, sampling=likeliest) for prompt in PROMPTS])
    for result, other in zip(results, drawn, strict=True):
        assert other.token_ids == result.token_ids
        for token, told in zip(result.token_ids, result.completions[0].logprobs, strict=True):
            assert (told.token_id, told.rank, told.top[0]) == (token, 1, (token, told.logprob))
            assert told.top[1][0] == token ^ 1, "the other of the two is the second"


def test_logprobs_are_those_of_float64_logits():
    model = MultiLoraModel(near_tied("llama"))
    sampling = SamplingParams(max_tokens=4, logprobs=5, prompt_logprobs=0)
    with Engine(model, EngineConfig(cache_bytes=2**22)) as engine, output_layer_seen(model.base) as seen:
        (result,) = engine.generate([Request(PROMPTS[0], sampling=sampling)])
    told = [*result.prompt_logprobs[1:], *result.completions[0].logprobs]
    expected = torch.cat([call.expected(weight_of(model)) for call in seen]).log_softmax(dim=-1)
    assert len(told) == len(expected) == len(PROMPTS[0]) + 3
    for row, entry in zip(expected, told, strict=True):
        for token, logprob in [(entry.token_id, entry.logprob), *entry.top]:
            assert abs(logprob - float(row[token])) <= 1e-4


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("fast_decode", [True, False])
def test_adapters_of_the_output_layer_are_not_rounded_either(fast_decode, options, tmp_path):
    base = near_tied("llama")
    folder = random_peft_adapter(base, tmp_path / "a", targets=["lm_head"], options=options)
    model = MultiLoraModel(base, fast_decode=fast_decode)
    model.load_adapter("a", folder)
    ids = torch.tensor(PROMPTS)
    with output_layer_seen(base) as seen:
        model.generate(
            ids, torch.ones_like(ids), adapters=[None, "a", "a:0.5"], max_new_tokens=4, do_sample=False, packed=False
        )
    factors = load_file(folder / "adapter_model.safetensors")
    a, b = (factors[f"base_model.model.lm_head.lora_{side}.weight"].bfloat16().double() for side in "AB")
    for call in seen:
        assert (call.logits.bfloat16().float() != call.logits).double().mean() > 0.5, "logits were rounded"
        expected = call.expected(weight_of(model))
        if not options:
            share = 2 * call.hidden.double() @ a.t() @ b.t()  # alpha / r is 2
            expected[1:] += torch.stack([share[1], 0.5 * share[2]])
            assert share[1].abs().max() > 0.01 * expected.abs().max()
        rows = slice(None) if not options else slice(0, 1)
        assert (call.logits.double() - expected)[rows].abs().max() <= 1e-5 * expected.abs().max()


def test_drafts_guess_by_float32_logits(tmp_path, monkeypatch):
    """With weight 0 a mixture's main pass is the base model, and every draft must be right."""
    model = MultiLoraModel(near_tied("llama"))
    for i in (1, 2):
        folder = random_peft_adapter(near_tied("llama"), tmp_path / str(i), targets=["q_proj"], seed=i)
        model.load_adapter(str(i), folder)
    model.create_mixture("m", ["1", "2"], XLoraConfig())
    guesses: list[Tensor] = []
    for owner, name in ((TwoPass, "guess"), (SpeculativeStep, "_guess_of")):
        former = getattr(owner, name)

        def guess(*args: object, former=former) -> Tensor:
            guesses.append(former(*args))
            return guesses[-1]

        monkeypatch.setattr(owner, name, guess if owner is TwoPass else staticmethod(guess))
    ids = torch.tensor(PROMPTS)
    with output_layer_seen(model.base) as seen:
        model.generate(ids, torch.ones_like(ids), adapters=["m:0"] * 3, draft=True, **GREEDY, packed=False)
    assert guesses
    weight = weight_of(model)
    wanted = {tuple(call.expected(weight).argmax(dim=-1)[-len(g) :].tolist()) for call in seen for g in guesses}
    assert all(tuple(guess.tolist()) in wanted for guess in guesses)
    counts = model.draft_counts
    assert counts.drafted == counts.accepted > 0
    with Engine(model, EngineConfig(cache_bytes=2**22)) as engine:
        engine.generate([Request(p, adapters="m:0", sampling=SamplingParams(max_tokens=NUM_TOKENS)) for p in PROMPTS])
        stats = engine.stats().counts
    assert stats.num_drafted == stats.num_accepted > 0


def test_forward_keeps_the_models_dtype():
    model = MultiLoraModel(near_tied("llama"))
    before = model.base(torch.tensor(PROMPTS)).logits
    logits = model(torch.tensor(PROMPTS)).logits
    assert logits.dtype == torch.bfloat16
    assert torch.equal(logits, before)


# Of equal logits, the lowest token


def test_of_equal_logits_the_lowest_token_is_first():
    logits = torch.full((1000,), -3.0)
    logits[[900, 5, 640, 17]] = 2.0
    logits[[901, 4]] = 1.0
    assert int(largest(logits.unsqueeze(0))) == 5
    assert top_tokens(logits, 5)[1].tolist() == [5, 17, 640, 900, 4]
    assert top_tokens(logits, 8)[1].tolist() == [5, 17, 640, 900, 4, 901, 0, 1]
    assert [token_logprobs(logits, token, 0).rank for token in (5, 17, 640, 900, 4, 901, 0)] == [1, 2, 3, 4, 5, 6, 7]


def test_logits_whose_probabilities_round_to_one_number_keep_their_order():
    logits = torch.zeros(50)
    logits[0] = 2000.0
    logits[7], logits[9] = 1.0, 1.00001
    told = token_logprobs(logits, 9, 3)
    assert [token for token, _ in told.top] == [0, 9, 7]
    assert told.rank == 2


def test_more_top_tokens_than_a_vocabulary_has_are_all_of_them():
    assert top_tokens(torch.tensor([1.0, 3.0, 3.0]), 9)[1].tolist() == [1, 2, 0]
