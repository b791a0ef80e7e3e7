"""Adapters whose embedding has another number of tokens than the base's: their rows as PEFT computes them alone."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from loraplex import MultiLoraModel
from loraplex.engine.config import EngineConfig
from loraplex.engine.engine import Engine
from loraplex.engine.request import Request
from loraplex.engine.sampling.params import SamplingParams
from loraplex.errors import BaseModelMismatchError, RequestError
from tests.parity.content_adapters import alone, base_model, content_adapter, prompts, resized, with_peft
from tests.parity.oracle import LOGIT_TOLERANCE, assert_close
from tests.tiny_models import VOCAB_SIZE

MORE, FEWER = VOCAB_SIZE + 3, VOCAB_SIZE - 8
NEW = [VOCAB_SIZE, VOCAB_SIZE + 1, VOCAB_SIZE + 2]
TARGETS = ["q_proj", "v_proj"]
# By name: how many tokens, and what PEFT saves.
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "saved": (MORE, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "copies": (MORE, {"save_embedding_layers": True}),
    "fewer": (FEWER, {"save_embedding_layers": True}),
}
TIED_CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "copies": (MORE, {"save_embedding_layers": True}),
    "rows": (MORE, {"trainable_token_indices": [4, *NEW]}),
    "both": (MORE, {"trainable_token_indices": NEW, "save_embedding_layers": True}),
    "tied": (MORE, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
}


class Served:
    def __init__(self, name: str, tied: bool, root: Path) -> None:
        self.base = base_model(name, tied=tied)
        self.model = MultiLoraModel(base_model(name, tied=tied))
        cases = TIED_CASES if tied else CASES
        self.oracles, self.sizes = {None: self.base}, {None: VOCAB_SIZE}
        for seed, (case, (size, options)) in enumerate(cases.items()):
            larger = resized(self.base, size)
            folder = content_adapter(larger, root / case, targets=TARGETS, seed=seed, **options)
            self.oracles[case], self.sizes[case] = with_peft(larger, folder), size
            self.model.load_adapter(case, folder)

    @property
    def choices(self) -> list[str | None]:
        return [choice for name in self.oracles if name is not None for choice in (name, None)]

    def prompts(self, seed: int) -> torch.Tensor:
        ids = prompts(len(self.choices), seed=seed)
        for row, choice in enumerate(self.choices):
            if self.sizes[choice] == MORE:
                ids[row, [2, 5, 8]] = torch.tensor(NEW)
            ids[row].clamp_(max=self.sizes[choice] - 1)
        return ids


@pytest.fixture(scope="module", params=["llama", "llama tied", "gemma2", "gemma2 tied"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    name, _, tied = request.param.partition(" ")
    return Served(name, bool(tied), tmp_path_factory.mktemp("adapters"))


@torch.no_grad()
def test_mixed_batch_has_each_rows_own_tokens_and_base_rows_keep_their_bits(served: Served) -> None:
    choices, ids = served.choices, served.prompts(0)
    logits = served.model(ids, adapters=choices).logits
    base_rows = [row for row, choice in enumerate(choices) if choice is None]
    before = served.model(ids[base_rows], adapters=[None] * len(base_rows)).logits
    for row, choice in enumerate(choices):
        size = served.sizes[choice]
        assert_close(logits[row, :, :size], alone(served.oracles[choice], ids[row]), f"row {row}, {choice}")
        assert bool((logits[row, :, size:] == -torch.inf).all())
    assert logits[base_rows, :, :VOCAB_SIZE].equal(before)


@pytest.mark.parametrize("packed", [True, False])
def test_generate_chooses_among_each_rows_own_tokens(served: Served, packed: bool) -> None:
    choices, ids = served.choices, served.prompts(1)
    tokens = served.model.generate(
        ids, torch.ones_like(ids), adapters=choices, packed=packed, max_new_tokens=6, do_sample=False
    )
    for row, choice in enumerate(choices):
        assert int(tokens[row].max()) < served.sizes[choice]
        expected = alone(served.oracles[choice], tokens[row, :-1])[len(ids[row]) - 1 :]
        chosen = expected.gather(1, tokens[row, len(ids[row]) :, None])[:, 0]
        span = float(expected.max() - expected.min())
        assert (expected.max(dim=1).values - chosen).max() <= LOGIT_TOLERANCE * span, f"{choice}"


def test_engine_answers_with_each_rows_own_tokens_and_base_rows_keep_their_bits(served: Served) -> None:
    choices, ids = served.choices, served.prompts(2)
    sampling = SamplingParams(max_tokens=6, temperature=0.0, logprobs=VOCAB_SIZE - 8)
    requests = [
        Request(tuple(row), adapters=choice, sampling=sampling)
        for row, choice in zip(ids.tolist(), choices, strict=True)
    ]
    config = EngineConfig(prefix_cache=False, max_step_tokens=64)
    with Engine(served.model, config) as engine:
        results = engine.generate(requests)
        base_rows = [row for row, choice in enumerate(choices) if choice is None]
        before = engine.generate([requests[row] for row in base_rows])
    for row, (choice, result) in enumerate(zip(choices, results, strict=True)):
        assert result.error is None, f"{choice}: {result.error}"
        logits = alone(served.oracles[choice], torch.tensor([*ids[row], *result.token_ids[:-1]])).double()
        logits = logits[len(ids[row]) - 1 :]
        tolerance = LOGIT_TOLERANCE * float(logits.max() - logits.min())
        expected = logits.log_softmax(dim=-1)
        for place, (token, told) in enumerate(zip(result.token_ids, result.completions[0].logprobs, strict=True)):
            assert float(expected[place].max() - expected[place, token]) <= tolerance, f"{choice}, token {place}"
            for other, logprob in told.top:
                assert abs(logprob - float(expected[place, other])) <= tolerance, f"{choice}, token {place}"
    for row, result in zip(base_rows, before, strict=True):
        assert results[row].token_ids == result.token_ids
        assert results[row].completions[0].logprobs == result.completions[0].logprobs


def test_tokens_of_other_rows_are_refused(served: Served) -> None:
    names = [name for name in served.sizes if served.sizes[name] == MORE]
    ids = torch.tensor([[3, VOCAB_SIZE, 4]] * 2)
    with pytest.raises(RequestError, match=f"row 1 has the token {VOCAB_SIZE}"):
        served.model(ids, adapters=[names[0], None])
    with Engine(served.model, EngineConfig()) as engine, pytest.raises(RequestError, match="can't be read"):
        engine.generate([Request((3, VOCAB_SIZE, 4))])


# Factors for embedding and output layer themselves: PEFT's users resize the base before they load such an adapter.


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("targets", [["q_proj", "embed_tokens"], ["q_proj", "lm_head"], ["embed_tokens", "lm_head"]])
@pytest.mark.parametrize("copies", [True, False])
def test_factors_of_a_resized_embedding_are_refused_with_the_fix_and_served_after_it(
    targets: list[str], tied: bool, copies: bool, tmp_path: Path
) -> None:
    larger = resized(base_model("llama", tied=tied), MORE)
    folder = content_adapter(larger, tmp_path, targets=targets, save_embedding_layers=copies)
    model = MultiLoraModel(base_model("llama", tied=tied))
    with pytest.raises(BaseModelMismatchError, match=rf"resized.*base\.resize_token_embeddings\({MORE}\)"):
        model.load_adapter("a", folder)
    assert model.names() == []
    served = MultiLoraModel(copy.deepcopy(larger))
    served.load_adapter("a", folder)
    ids = prompts(2, seed=0)
    ids[:, [2, 5]] = torch.tensor(NEW[:2])
    logits = served(ids, adapters=["a", None]).logits
    assert_close(logits[0], alone(with_peft(larger, folder), ids[0]), "a")
    assert_close(logits[1], larger(ids[1:]).logits[0], "base")
