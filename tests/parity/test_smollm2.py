"""A real model, SmolLM2-135M: every row of a mixed batch against PEFT running that row alone."""

import pytest
import torch
from torch import Tensor

from loraplex import MultiLoraModel
from loraplex.models.checkpoints.loading import load_base_model, load_tokenizer
from loraplex.models.text.prompts import encode_prompts
from tests.parity.oracle import PeftOracle, assert_close
from tests.tiny_models import LLAMA_TARGETS, random_peft_adapter

NEW_TOKENS = 24
LINK = [("small", 0.7), ("large", -0.4)]
# What a row asks for, and what PEFT runs; DoRA comes last.
ROWS = {
    None: None,
    "small": "small",
    "medium": "medium",
    "large": "large",
    "small:0.7+large:-0.4": "link",
    "dora": "dora",
}
PROMPTS = (
    "What is the capital of France?",
    "Name three proteins.",
    "Which elements does a perovskite solar cell contain, and why is lead among them?",
    "Hello!",
    "Write one sentence about quantum computers.",
    "What does a peptide bond join?",
)


@pytest.fixture(scope="module")
def pair(smollm2, tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("adapters")
    base, _ = load_base_model(smollm2, dtype="float32")
    settings = {
        "small": {"r": 4, "lora_alpha": 8},
        "medium": {"r": 9, "lora_alpha": 9},
        "large": {"r": 32, "lora_alpha": 16},
        "dora": {"r": 8, "options": {"use_dora": True}},
    }
    folders = {
        name: random_peft_adapter(base, folder / name, targets=LLAMA_TARGETS, seed=seed, **options)
        for seed, (name, options) in enumerate(settings.items())
    }
    model = MultiLoraModel.from_pretrained(smollm2, dtype="float32")
    for name, path in folders.items():
        model.load_adapter(name, path)
    oracle = PeftOracle(base, folders)
    oracle.link("link", LINK)
    return model, oracle


@pytest.fixture(scope="module")
def batch(smollm2) -> tuple[Tensor, Tensor]:  # [rows, tokens] each, padded on the left
    encoded = encode_prompts(load_tokenizer(smollm2), PROMPTS)
    return encoded["input_ids"], encoded["attention_mask"]


@torch.no_grad()
def test_logits_of_every_row_equal_peft_alone(pair, batch):
    model, oracle = pair
    ids, mask = batch
    logits = model(ids, mask, adapters=list(ROWS)).logits
    for row, peft_name in enumerate(ROWS.values()):
        real = mask[row].bool()
        expected = oracle.logits(peft_name, ids[row], mask[row])
        assert_close(logits[row][real], expected[real], f"row {row} ({peft_name})")


@torch.no_grad()
@pytest.mark.slow
def test_greedy_tokens_of_every_row_equal_peft_alone(pair, batch):
    model, oracle = pair
    ids, mask = batch
    options = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS, "do_sample": False}
    tokens = model.generate(ids, mask, adapters=list(ROWS), **options)
    for row, peft_name in enumerate(ROWS.values()):
        expected = oracle.generate(peft_name, ids[row], mask[row], **options)[0]
        assert torch.equal(tokens[row], expected), f"row {row} ({peft_name})"
    assert len({tuple(row.tolist()) for row in tokens[:, ids.shape[1] :]}) == len(ROWS), "the adapters did nothing"
