"""Adapters that bring embeddings, output layers, token rows or biases: every row as PEFT computes it alone."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from loraplex import MultiLoraModel
from loraplex.engine.config import EngineConfig
from loraplex.engine.engine import Engine
from loraplex.engine.request import Request
from loraplex.engine.sampling.params import SamplingParams
from tests.parity.content_adapters import (
    alone,
    base_model,
    content_adapter,
    folders_of,
    prompts,
    with_link,
    with_peft,
)
from tests.parity.oracle import LOGIT_TOLERANCE, assert_close

ATTENTION = ["q_proj", "v_proj"]
TOKENS = [5, 17, 40, 41]
GPT2 = ["c_attn", "c_fc"]

# By name: the base, whether its output layer is tied, and the adapters.
BASES: dict[str, tuple[str, bool, dict[str, dict[str, Any]]]] = {
    "llama": (
        "llama",
        False,
        {
            "both": {"targets": ATTENTION, "modules_to_save": ["embed_tokens", "lm_head"]},
            "head": {"targets": ATTENTION, "modules_to_save": ["lm_head"]},
            "copies": {"targets": ["q_proj", "lm_head", "embed_tokens"]},
            "rows": {"targets": ATTENTION, "trainable_token_indices": TOKENS},
            "named": {"targets": ATTENTION, "trainable_token_indices": {"embed_tokens": TOKENS, "lm_head": [7]}},
            "norms": {"targets": ATTENTION, "modules_to_save": ["norm", "input_layernorm"]},
            "lora_bias": {"targets": ATTENTION, "lora_bias": True},
            "plain": {"targets": ATTENTION},
        },
    ),
    "llama tied": (
        "llama",
        True,
        {
            "saved": {"targets": ATTENTION, "modules_to_save": ["embed_tokens"]},
            "tied": {"targets": ATTENTION, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
            "rows": {"targets": ATTENTION, "trainable_token_indices": TOKENS},
            "apart": {"targets": ATTENTION, "trainable_token_indices": {"embed_tokens": TOKENS, "lm_head": [7, 9]}},
            "copies": {"targets": ["q_proj", "embed_tokens"]},
        },
    ),
    "gemma2": (
        "gemma2",
        False,
        {
            "both": {"targets": ATTENTION, "modules_to_save": ["embed_tokens", "lm_head"]},
            "rows": {"targets": ATTENTION, "trainable_token_indices": TOKENS},
            "plain": {"targets": ["q_proj", "embed_tokens"]},
        },
    ),
    "gemma2 tied": ("gemma2", True, {"rows": {"targets": ATTENTION, "trainable_token_indices": TOKENS}}),
    "gpt2": (
        "gpt2",
        True,
        {
            "all": {"targets": GPT2, "bias": "all", "fan_in_fan_out": True},
            "own": {"targets": GPT2, "bias": "lora_only", "fan_in_fan_out": True},
            "rows": {"targets": GPT2, "trainable_token_indices": {"wte": TOKENS}, "fan_in_fan_out": True},
            "lora_bias": {"targets": GPT2, "lora_bias": True, "fan_in_fan_out": True},
            "saved": {"targets": GPT2, "modules_to_save": ["wte", "ln_f"], "fan_in_fan_out": True},
        },
    ),
    "qwen2": (
        "qwen2",
        True,
        {
            "all": {"targets": ATTENTION, "bias": "all"},
            "rows": {"targets": ["o_proj"], "bias": "lora_only", "trainable_token_indices": TOKENS},
        },
    ),
    "opt": ("opt", False, {"all": {"targets": ["q_proj", "fc1"], "bias": "all"}}),
}


class Served:
    """One base with its adapters, and each adapter's folder."""

    def __init__(self, case: str, root: Path) -> None:
        name, tied, adapters = BASES[case]
        self.base = base_model(name, tied=tied)
        self.folders = folders_of(self.base, root, adapters)
        self.model = MultiLoraModel(base_model(name, tied=tied))
        for adapter, folder in self.folders.items():
            self.model.load_adapter(adapter, folder)
        self.links = {}
        # PEFT merges a lora_bias only into a bias of the base's.
        names = [adapter for adapter in adapters if adapter != "lora_bias" or name == "gpt2"]
        for first, second in itertools.pairwise(names):
            self.links[f"{first}:0.7+{second}:-0.4"] = [(self.folders[first], 0.7), (self.folders[second], -0.4)]
        self._oracles: dict[str | None, PreTrainedModel] = {}

    @property
    def choices(self) -> list[str | None]:
        return [choice for name in [*self.folders, *self.links] for choice in (None, name)]

    def oracle(self, choice: str | None) -> PreTrainedModel:
        if choice not in self._oracles:
            if choice is None:
                made = self.base
            elif choice in self.links:
                made = with_link(self.base, self.links[choice])
            else:
                made = with_peft(self.base, self.folders[choice])
            self._oracles[choice] = made
        return self._oracles[choice]


@pytest.fixture(scope="module", params=list(BASES))
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    return Served(request.param, tmp_path_factory.mktemp("adapters"))


@torch.no_grad()
def test_mixed_batch_is_each_row_alone_and_base_rows_keep_their_bits(served: Served) -> None:
    choices = served.choices
    ids = prompts(len(choices))
    logits = served.model(ids, adapters=choices).logits
    before = served.model(ids, adapters=[None] * len(choices)).logits
    for row, choice in enumerate(choices):
        expected = alone(served.oracle(choice), ids[row])
        assert_close(logits[row], expected, f"row {row}, {choice}")
        if choice is None:
            assert logits[row].equal(before[row])
        else:  # or the comparison would be empty
            assert (expected - before[row]).abs().max() > 0.05 * (expected.max() - expected.min())


def test_generate_chooses_the_tokens_of_each_row_alone(served: Served) -> None:
    choices = served.choices
    ids = prompts(len(choices), seed=1)
    for packed in (True, False):
        options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
        tokens = served.model.generate(ids, torch.ones_like(ids), adapters=choices, packed=packed, **options)
        for row, choice in enumerate(choices):
            expected = alone(served.oracle(choice), tokens[row, :-1])[len(ids[row]) - 1 :]
            chosen = expected.gather(1, tokens[row, len(ids[row]) :, None])[:, 0]
            span = float(expected.max() - expected.min())
            assert (expected.max(dim=1).values - chosen).max() <= LOGIT_TOLERANCE * span, f"{choice}, packed={packed}"


def test_engine_answers_as_each_row_alone(served: Served) -> None:
    choices = served.choices
    ids = prompts(len(choices), seed=2)
    sampling = SamplingParams(max_tokens=6, temperature=0.0, logprobs=3)
    requests = [
        Request(tuple(row), adapters=choice, sampling=sampling)
        for row, choice in zip(ids.tolist(), choices, strict=True)
    ]
    base_rows = [row for row, choice in enumerate(choices) if choice is None]
    with Engine(served.model, EngineConfig(max_step_tokens=16, prefix_cache=False)) as engine:
        results = engine.generate(requests)
        before = engine.generate([requests[row] for row in base_rows])
    for row, result in zip(base_rows, before, strict=True):
        assert results[row].token_ids == result.token_ids
        assert results[row].completions[0].logprobs == result.completions[0].logprobs
    for row, (choice, result) in enumerate(zip(choices, results, strict=True)):
        assert result.error is None, f"{choice}: {result.error}"
        with torch.no_grad():
            logits = alone(served.oracle(choice), torch.tensor([*ids[row], *result.token_ids[:-1]])).double()
        logits = logits[len(ids[row]) - 1 :]
        tolerance = LOGIT_TOLERANCE * float(logits.max() - logits.min())
        expected = logits.log_softmax(dim=-1)
        for place, (token, told) in enumerate(zip(result.token_ids, result.completions[0].logprobs, strict=True)):
            assert float(expected[place].max() - expected[place, token]) <= tolerance, f"{choice}, token {place}"
            for other, logprob in [(told.token_id, told.logprob), *told.top]:
                assert abs(logprob - float(expected[place, other])) <= tolerance, f"{choice}, token {place}"


@torch.no_grad()
def test_16_bit_rows_are_near_those_of_peft_and_choose_by_float32_sums(tmp_path: Path) -> None:
    base = base_model("llama").bfloat16()
    options = {"modules_to_save": ["embed_tokens", "lm_head", "norm"]}
    folder = content_adapter(base, tmp_path / "a", targets=ATTENTION, seed=1, **options)
    rows = content_adapter(base, tmp_path / "b", targets=ATTENTION, seed=2, trainable_token_indices=TOKENS)
    model = MultiLoraModel(base_model("llama").bfloat16())
    ids, choices = prompts(4), [None, "a", "b", None]
    for name, path in (("a", folder), ("b", rows)):
        model.load_adapter(name, path)
    logits = model(ids, adapters=choices).logits
    for row, (choice, path) in enumerate(zip(choices, (None, folder, rows, None), strict=True)):
        expected = alone(base if path is None else with_peft(base, path), ids[row]).float()
        error = (logits[row].float() - expected).abs().max()
        assert error <= (0 if choice is None else 0.03) * (expected.max() - expected.min()), f"{choice}: {error}"
    sampling = SamplingParams(max_tokens=4, temperature=0.0, logprobs=3)
    requests = [
        Request(tuple(ids[row].tolist()), adapters=choice, sampling=sampling) for row, choice in enumerate(choices)
    ]
    with Engine(model, EngineConfig(batch_invariant=True, prefix_cache=False)) as engine:
        together = engine.generate(requests)
        apart = [engine.generate([request])[0] for request in requests]
    for one, other in zip(together, apart, strict=True):
        assert one.completions[0].logprobs == other.completions[0].logprobs
