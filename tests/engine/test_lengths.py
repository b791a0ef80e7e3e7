"""Positions that depend on how long a sequence is: each answer is that of transformers' generate alone."""

import copy
from collections.abc import Sequence

import peft
import pytest
import torch

from loraplex import MultiLoraModel
from loraplex.engine.config import EngineConfig
from loraplex.engine.engine import Engine
from loraplex.engine.request import Request
from loraplex.engine.sampling.params import SamplingParams
from loraplex.engine.worker.cuda_graphs import run_again
from tests.architectures.variants import make_model
from tests.engine.engines import TIE
from tests.tiny_models import random_peft_adapter

NEW = 12
THRESHOLD = 24  # tokens, of all models here
CONFIG = EngineConfig(cache_bytes=2**22, max_length=200, block_tokens=4, max_step_tokens=16)


def _model(name: str):
    """`llama-longrope` is Phi-3's kind of positions in a model whose generate goes on with the keys that it has."""
    if name != "llama-longrope":
        return make_model(name)
    base = make_model("llama")
    positions = copy.deepcopy(make_model("phi3-longrope").model.rotary_emb)
    base.model.rotary_emb = positions
    return base


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("llama-longrope", "llama-dynamic-ntk")]


@pytest.fixture(scope="module", params=["phi3-longrope", *SLOW])
def case(request, tmp_path_factory):
    name = request.param
    folder = random_peft_adapter(_model(name), tmp_path_factory.mktemp(name) / "a", targets="all-linear", seed=2)
    return name, folder


def _expected(case, prompt: Sequence[int], adapter: str | None):
    """Tokens and logits of a model that has run nothing else: some keep the frequencies of the longest sequence."""
    name, folder = case
    base = _model(name)
    model = base if adapter is None else peft.PeftModel.from_pretrained(base, str(folder)).eval()
    ids = torch.tensor([prompt])
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences[0, len(prompt) :].tolist(), [logits[0] for logits in out.logits]


def _check(case, requests, results) -> None:
    for (prompt, adapter), result in zip(requests, results, strict=True):
        assert result.error is None
        tokens, logits = _expected(case, prompt, adapter)
        for place, (ours, theirs) in enumerate(zip(result.token_ids, tokens, strict=True)):
            own = logits[place]
            assert result.logprobs[place].logprob == pytest.approx(own.log_softmax(-1)[ours].item(), abs=2e-3)
            if ours != theirs:
                assert (own[theirs] - own[ours]) / (own.max() - own.min()) < TIE
                break


def _ask(requests) -> list[Request]:
    sampling = SamplingParams(max_tokens=NEW, logprobs=1)
    return [Request(prompt, adapters=adapter, sampling=sampling) for prompt, adapter in requests]


def _prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(torch.randint(2, 120, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


def _engine(case, **changed: object) -> Engine:
    model = MultiLoraModel(_model(case[0]))
    model.load_adapter("a", case[1])
    return Engine(model, EngineConfig(**{**CONFIG.__dict__, **changed}))


@pytest.mark.parametrize("recorded", [False, True])
def test_short_and_long_sequences_share_passes(case, recorded):
    """Prompts in chunks, on both sides of the threshold; answers that cross it beside others."""
    requests = [(_prompt(n, n), adapter) for n in (9, 20, 24, 40) for adapter in (None, "a")]
    with _engine(case) as engine:
        if recorded:
            if not engine._runner.lengths.is_step:
                pytest.skip("steps whose positions change with every token are not recorded")
            engine._runner.use_graphs(run_again)
        _check(case, requests, engine.generate(_ask(requests)))


def test_a_prefix_is_shared_only_where_its_positions_are_the_same(case):
    long = _prompt(44)
    with _engine(case) as engine:
        for length in (12, 44, 20, 34, 23, 25, 44):
            requests = [(long[:length], None)]
            _check(case, requests, engine.generate(_ask(requests)))
        (again,) = engine.generate(_ask([(long, None)]))
        assert again.num_cached_tokens >= 40, "the same prompt finds its own keys"


def test_generations_that_lose_their_keys_compute_the_same_again(case):
    requests = [(_prompt(n, n), adapter) for n in (20, 23, 30) for adapter in (None, "a")]
    blocks = 20  # of some 54 that they need together
    with _engine(case) as engine:
        block_bytes = CONFIG.cache_bytes // engine.stats().num_blocks
    with _engine(case, cache_bytes=blocks * block_bytes, max_length=80) as engine:
        results = engine.generate(_ask(requests))
        assert engine.stats().num_preempted > 0
        _check(case, requests, results)


def test_below_the_threshold_nothing_depends_on_lengths(case):
    with _engine(case, max_length=THRESHOLD) as engine:
        assert engine._runner.lengths.threshold is None
    with _engine(case) as engine:
        assert engine._runner.lengths.threshold == THRESHOLD
        assert engine._runner.lengths.begins_anew == (case[0] == "phi3-longrope")
