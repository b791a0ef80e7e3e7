"""The sizes in docs/serving.md are those that the code's own classes give."""

import copy
import re
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from loraplex.bench.random_adapters import random_adapter
from loraplex.engine.worker.attention_hooks import AttentionHooks
from loraplex.layers.base.modules import adaptable_modules

PAGE = (Path(__file__).parent.parent.parent / "docs/serving.md").read_text(encoding="utf-8")
COLUMNS = {
    "SmolLM2-135M": LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        dtype="bfloat16",
    ),
    "Llama-3.1-8B": LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=False,
        dtype="bfloat16",
    ),
}


def row(start: str) -> dict[str, int]:
    """The numbers of bytes in one row of the page's table, by column."""
    line = next(line for line in PAGE.splitlines() if line.startswith(f"| {start}"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert len(cells) == 2 + len(COLUMNS)
    return {name: int(re.sub(r"\D", "", cell)) for name, cell in zip(COLUMNS, cells[2:], strict=True)}


@pytest.fixture(scope="module", params=list(COLUMNS))
def base(request: pytest.FixtureRequest) -> tuple[str, LlamaForCausalLM]:
    """A model of these shapes without memory for its weights."""
    config = COLUMNS[request.param]
    with torch.device("meta"):
        return request.param, LlamaForCausalLM(config).to(torch.bfloat16)


def test_base_weights(base: tuple[str, LlamaForCausalLM]):
    name, model = base
    model.tie_weights()
    assert row("base model")[name] == sum(weight.numel() * weight.element_size() for weight in model.parameters())


@pytest.mark.parametrize("name", list(COLUMNS))
def test_keys_and_values_of_a_token(name: str):
    config = copy.deepcopy(COLUMNS[name])
    num_layers, config.num_hidden_layers = config.num_hidden_layers, 1  # the engine finds them by running the model
    config.vocab_size = config.intermediate_size = 64
    attachment = AttentionHooks(LlamaForCausalLM(config).to(torch.bfloat16))
    try:
        assert row("a token's keys")[name] == num_layers * sum(s.token_bytes for s in attachment.shapes.values())
    finally:
        attachment.detach()


def test_adapter_for_each_rank(base: tuple[str, LlamaForCausalLM]):
    name, model = base
    adapter = random_adapter(adaptable_modules(model), 1, torch.bfloat16, seed=0)
    assert row("an adapter, for each rank")[name] == adapter.num_bytes
