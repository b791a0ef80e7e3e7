"""Activated LoRA: adapted from the last occurrence of the invocation sequence on, as PEFT does it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.lora.variants import calculate_alora_offsets

from loraplex import MultiLoraModel
from loraplex.models.scope import tokens_from_invocation
from tests.examples import examples
from tests.parity.oracle import PeftOracle, assert_close
from tests.tiny_models import linear_targets, random_peft_adapter, tiny_model

INVOCATION = [7, 8, 9]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alora")
    base = tiny_model(request.param)
    targets = linear_targets(request.param)
    settings = {"alora_invocation_tokens": INVOCATION, "task_type": "CAUSAL_LM"}
    folders = {
        "alora": random_peft_adapter(base, folder / "alora", targets=targets, seed=1, options=settings),
        "plain": random_peft_adapter(base, folder / "plain", targets=targets, seed=2),
    }
    model = MultiLoraModel(tiny_model(request.param))
    for name, path in folders.items():
        model.load_adapter(name, path)
    return model, PeftOracle(base, folders)


def prompts():
    """Invocation in the middle, twice, at the very end, at the very start, cut off at the end, absent."""
    ids = torch.randint(20, 100, (6, 12))
    ids[0, 4:7] = ids[1, 1:4] = ids[1, 6:9] = ids[2, 9:12] = ids[3, 0:3] = torch.tensor(INVOCATION)
    ids[4, 10:12] = torch.tensor(INVOCATION[:2])
    return ids, torch.ones_like(ids)


@torch.no_grad()
def test_logits_equal_peft(pair):
    model, oracle = pair
    ids, mask = prompts()
    logits = model(ids, mask, adapters=["alora"] * 6).logits
    base = model(ids, mask).logits
    for row in range(6):
        assert_close(logits[row], oracle.logits("alora", ids[row], mask[row]), f"row {row}")
    assert torch.equal(logits[0, :4], base[0, :4])
    assert not torch.equal(logits[0, 4:], base[0, 4:])
    assert torch.equal(logits[4:], base[4:])


@torch.no_grad()
def test_greedy_tokens_equal_peft_in_a_mixed_batch(pair):
    model, oracle = pair
    ids, mask = prompts()
    rows = ["alora", "plain", "alora", None, "alora", "alora"]
    options = {"max_new_tokens": 10, "do_sample": False}
    tokens = model.generate(ids, mask, adapters=rows, **options)
    for row, name in enumerate(rows):
        assert torch.equal(tokens[row : row + 1], oracle.generate(name, ids[row], mask[row], **options)), f"row {row}"


@examples(200)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=12), st.lists(st.integers(0, 2), min_size=1, max_size=4))
def test_active_tokens_are_counted_as_peft_counts_them(ids, invocation):
    from types import SimpleNamespace

    config = {"a": SimpleNamespace(alora_invocation_tokens=invocation)}
    (expected,) = calculate_alora_offsets(config, "a", torch.tensor([ids]))
    assert tokens_from_invocation(torch.tensor(ids), invocation) == (expected or 0)
