"""The engine against transformers (base rows), PEFT (adapters, links, aLoRA) and PEFT's X-LoRA (mixtures).

Not against this package's own `generate`: every token of an answer is judged by its oracle, which reads the whole
sequence at once, without a cache.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from loraplex import MultiLoraModel, XLoraConfig
from loraplex.engine.config import EngineConfig
from loraplex.engine.engine import Engine
from loraplex.engine.request import RequestResult
from tests.engine.engines import INVOCATION, Prompted, prompts, write_adapters
from tests.parity.oracle import LOGIT_TOLERANCE, PeftOracle
from tests.parity.xlora_oracle import peft_logits, peft_xlora
from tests.tiny_models import TINY_CAUSAL_MODELS, linear_targets, random_peft_adapter, tiny_model

LINK = "0:0.5+2:0.7"
MIXTURES = {
    "science": XLoraConfig(xlora_depth=2, xlora_size=32, layerwise_scalings=True, softmax_temperature=0.5),
    "second": XLoraConfig(xlora_depth=2, xlora_size=32, scaling_pass_value=0.5, global_scaling_weight=2.0),
}
CHOICES = (None, "0", "1", "2", LINK, "alora", *MIXTURES)
LENGTHS = (21, 5, 33, 12, 27, 18, 9, 30)
NUM_TOKENS = 8
NUM_TOP = 5
FAST = ("llama", "gemma2", "gpt2")

Oracle = Callable[[Tensor], Tensor]  # [tokens] -> [tokens, vocab]


@dataclass(frozen=True)
class Served:
    """A model with adapters of all kinds, and for each choice of a row what tells its logits."""

    model: MultiLoraModel
    oracles: Mapping[str | None, Oracle]

    def check(self, prompted: Prompted, result: RequestResult) -> None:
        """The answer is greedy by its oracle's logits, and all that was told of probabilities is the oracle's."""
        assert result.error is None, f"{prompted.adapters}: {result.error}"
        answer = result.token_ids
        assert len(answer) == NUM_TOKENS
        with torch.no_grad():
            logits = self.oracles[prompted.adapters](torch.tensor([*prompted.prompt, *answer[:-1]])).double()
        logits = logits[len(prompted.prompt) - 1 :]
        tolerance = LOGIT_TOLERANCE * float(logits.max() - logits.min())
        logprobs = logits.log_softmax(dim=-1)
        for place, (token, told) in enumerate(zip(answer, result.completions[0].logprobs, strict=True)):
            where = f"{prompted.adapters}, token {place}"
            best = float(logprobs[place].max())
            assert best - float(logprobs[place, token]) <= tolerance, f"{where}: {token} is not the likeliest"
            assert len(told.top) == NUM_TOP
            for other, logprob in [(told.token_id, told.logprob), *told.top]:
                error = abs(logprob - float(logprobs[place, other]))
                assert error <= tolerance, f"{where}: the logprob of {other} is off by {error:.1e} > {tolerance:.1e}"


def make_served(name: str, folder) -> Served:
    base, folders, linears = tiny_model(name), write_adapters(name, folder), linear_targets(name)
    # PEFT looks for the invocation only in a model whose task it knows.
    options = {"alora_invocation_tokens": INVOCATION, "task_type": "CAUSAL_LM"}
    # PEFT's aLoRA and X-LoRA can't adapt a module whose input has no dimension of rows, as OPT's fc1 and fc2.
    flat = {"fc1", "fc2"} if name == "opt" else set()
    in_rows = [target for target in linears if target not in flat]
    alora = random_peft_adapter(base, folders.pop("alora"), targets=in_rows, seed=9, options=options)
    model = MultiLoraModel(tiny_model(name))
    for adapter, path in {**folders, "alora": alora}.items():
        model.load_adapter(adapter, path)
    peft, peft_alora = PeftOracle(base, folders), PeftOracle(base, {"alora": alora})
    peft.link("link", [("0", 0.5), ("2", 0.7)])
    oracles: dict[str | None, Oracle] = {}
    for choice in CHOICES:
        row, oracle = "link" if choice == LINK else choice, peft_alora if choice == "alora" else peft
        if choice not in MIXTURES:
            oracles[choice] = lambda ids, row=row, oracle=oracle: oracle.logits(row, ids, torch.ones_like(ids))
    experts = {
        f"expert-{i}": random_peft_adapter(base, folder / f"expert-{i}", targets=targets, seed=20 + i, r=2 + i)
        for i, targets in enumerate((in_rows, in_rows[:2], in_rows))
    }
    for expert, path in experts.items():
        model.load_adapter(expert, path)
    for mixture, config in MIXTURES.items():
        xlora = peft_xlora(base, experts, config, seed=5)
        model.create_mixture(mixture, list(experts), config)
        model.mixtures.get(mixture).head.load_state_dict(xlora.base_model.internal_xlora_classifier.state_dict())
        oracles[mixture] = lambda ids, xlora=xlora: peft_logits(xlora, ids)[0]
    return Served(model, oracles)


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in TINY_CAUSAL_MODELS],
)
def served(request, tmp_path_factory) -> Served:
    return make_served(request.param, tmp_path_factory.mktemp(request.param))


def cache_bytes(model: MultiLoraModel, num_tokens: int) -> int:
    """Room for the keys and values of so many tokens."""
    config = model.base.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * dim * 4 * num_tokens


def run(engine: Engine, asked: list[Prompted]) -> list[RequestResult]:
    return engine.generate([prompted.request(max_tokens=NUM_TOKENS, logprobs=NUM_TOP) for prompted in asked])


def test_a_mixed_batch_with_chunked_prompts(served):
    asked = prompts(LENGTHS, CHOICES)
    with Engine(served.model, EngineConfig(cache_bytes=2**22, max_step_tokens=24, block_tokens=4)) as engine:
        results = run(engine, asked)
        assert engine.stats().num_preempted == 0
    for prompted, result in zip(asked, results, strict=True):
        served.check(prompted, result)


def test_prefix_cache_hits(served):
    """Each row goes on from its own answer, and the base row's prompt also goes on as an aLoRA's."""
    first = prompts(LENGTHS, CHOICES)
    with Engine(served.model, EngineConfig(cache_bytes=2**22, block_tokens=4)) as engine:
        answered = run(engine, first)
        later = [
            Prompted((*prompted.prompt, *result.token_ids, 50 + i), prompted.adapters)
            for i, (prompted, result) in enumerate(zip(first, answered, strict=True))
        ]
        later.append(Prompted((*first[0].prompt, *INVOCATION, 60, 61), "alora"))
        results = run(engine, later)
    for prompted, result in zip(later, results, strict=True):
        assert result.num_cached_tokens >= 4, f"{prompted.adapters}: nothing was found in the prefix cache"
        served.check(prompted, result)


@pytest.mark.parametrize("draft", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_rows_that_give_way_and_come_back(served, draft):
    asked = prompts(LENGTHS, CHOICES, seed=1)
    config = EngineConfig(
        cache_bytes=cache_bytes(served.model, 112),
        max_length=48,
        max_step_tokens=40,
        block_tokens=4,
        fair_tokens=8,
        draft=draft,
    )
    with Engine(served.model, config) as engine:
        results = run(engine, asked)
        stats = engine.stats()
    assert stats.num_preempted > 0, "the blocks must not suffice for all"
    assert stats.num_blocks_held == 0
    for prompted, result in zip(asked, results, strict=True):
        served.check(prompted, result)
