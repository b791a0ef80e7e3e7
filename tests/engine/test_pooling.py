"""Prompts as one vector: the last hidden states that PEFT gives for the row alone, in any company."""

import copy

import pytest
import torch
from peft import PeftModel

from loraplex import Engine, EngineConfig, MultiLoraModel, Request, SamplingParams
from loraplex.errors import RequestError
from tests.engine.engines import make_model, write_adapters
from tests.tiny_models import VOCAB_SIZE, tiny_model

LENGTHS = (1, 2, 17, 40)
CONFIG = EngineConfig(cache_bytes=2**20, max_step_tokens=8, block_tokens=4, max_running=6)


def prompt_of(length: int, seed: int = 0) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed + length)
    return tuple(torch.randint(2, VOCAB_SIZE, (length,), generator=generator).tolist())


def pooled(hidden: torch.Tensor, pooling: str) -> torch.Tensor:  # [tokens, hidden]
    return hidden[-1] if pooling == "last" else hidden.double().mean(dim=0).float()


@pytest.fixture(scope="module", params=["llama", "opt"])
def prepared(request, tmp_path_factory):
    """A model, and the last hidden states of each prompt by transformers and PEFT: of the base model and adapter 0."""
    name = request.param
    folders = write_adapters(name, tmp_path_factory.mktemp(name))
    base = tiny_model(name)
    adapted = PeftModel.from_pretrained(copy.deepcopy(base), str(folders["0"])).eval()
    expected = {}
    for length in LENGTHS:
        ids = torch.tensor([prompt_of(length)])
        for adapters, model in ((None, base), ("0", adapted)):
            with torch.no_grad():
                expected[length, adapters] = model(ids, output_hidden_states=True).hidden_states[-1][0]
    return make_model(name, folders, mixtures=name == "llama"), expected


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_vectors_are_pefts_beside_answers_and_each_other(prepared, pooling):
    model, expected = prepared
    wanted = [Request(prompt_of(n), adapters=a, pooling=pooling) for n, a in expected]
    answering = [Request(prompt_of(9), adapters="1", sampling=SamplingParams(max_tokens=12))]
    with Engine(model, CONFIG) as engine:
        (alone,) = engine.generate(answering)
        beside, *results = engine.generate([*answering, *wanted])
        again = engine.generate(wanted)  # the prefix cache has the prompts now
    assert beside.token_ids == alone.token_ids
    for key, first, second in zip(expected, results, again, strict=True):
        for result in (first, second):
            assert (result.finish_reason, result.token_ids, result.text) == ("stop", (), "")
            reference = pooled(expected[key], pooling)
            torch.testing.assert_close(result.embedding, reference, rtol=1e-4, atol=1e-4 * float(reference.abs().max()))
    cached = [result.num_cached_tokens for result in again]
    assert any(cached) if pooling == "last" else not any(cached)


@pytest.mark.parametrize("prepared", ["llama"], indirect=True)
def test_a_mixtures_row_is_that_of_generate(prepared):
    model, _ = prepared
    ids = torch.tensor([prompt_of(17)])
    with torch.no_grad():
        reference = model(ids, adapters=["science"], output_hidden_states=True).hidden_states[-1][0]
    with Engine(model, CONFIG) as engine:
        (result,) = engine.generate([Request(prompt_of(17), adapters="science", pooling="mean")])
    torch.testing.assert_close(result.embedding, pooled(reference, "mean"), rtol=1e-3, atol=1e-3)


def test_requests_that_give_way_lose_nothing(prepared):
    """Blocks for two prompts and a half: sequences are evicted in the middle, and run again."""
    model, expected = prepared
    token_bytes = 2 * 2 * 2 * 16 * 4 if model.base.config.model_type == "llama" else 2 * 2 * 4 * 16 * 4
    config = EngineConfig(cache_bytes=token_bytes * 100, max_step_tokens=8, block_tokens=4, max_running=6)
    answers = [Request(prompt_of(20, seed), sampling=SamplingParams(max_tokens=30)) for seed in range(4)]
    with Engine(model, config) as engine:
        results = engine.generate(
            [*answers, *(Request(prompt_of(40), adapters=a, pooling="mean") for a in (None, "0"))]
        )
        assert engine.stats().num_blocks_held == 0
    for adapters, result in zip((None, "0"), results[-2:], strict=True):
        reference = pooled(expected[40, adapters], "mean")
        torch.testing.assert_close(result.embedding, reference, rtol=1e-4, atol=1e-4 * float(reference.abs().max()))


@pytest.mark.parametrize(
    "request_",
    [
        Request([5], pooling="max"),
        Request([5], pooling="mean", sampling=SamplingParams(n=2)),
        Request([5], pooling="mean", sampling=SamplingParams(prompt_logprobs=1)),
        Request([5], pooling="mean", return_scalings=True),
    ],
)
def test_what_has_no_vector_is_refused(request_):
    with Engine(MultiLoraModel(tiny_model("llama")), CONFIG) as engine, pytest.raises(RequestError, match="pooling"):
        engine.generate([request_])
