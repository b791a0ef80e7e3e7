"""LLM.int8() with outliers: a token's decomposition doesn't depend on the others, and is that of the token alone."""

import copy

import pytest
import torch
from transformers import BitsAndBytesConfig

from loraplex import MultiLoraModel
from tests.parity.oracle import PeftOracle
from tests.quantized.bases import assert_near, load, write_adapters, write_plain
from tests.tiny_models import VOCAB_SIZE

pytestmark = pytest.mark.needs("bitsandbytes")
THRESHOLD = 1.5  # of values that are near 1: each token has some outliers


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_plain(tmp_path_factory.mktemp("int8"))


def load_with_outliers(folder):
    return load(folder, "int8", config=BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=THRESHOLD))


def linear_of(base):
    return base.model.layers[0].mlp.up_proj


def test_each_token_of_a_call_gets_what_bitsandbytes_gives_it_alone(folder):
    base = load_with_outliers(folder)
    x = torch.randn(2, 7, 64)
    alone = torch.stack([torch.stack([linear_of(base)(token[None])[0] for token in row]) for row in x])
    together = linear_of(base)(x)
    assert (together - alone).abs().max() > 1e-3 * alone.abs().max(), "bitsandbytes itself keeps tokens apart"
    model = MultiLoraModel(base)
    assert torch.allclose(linear_of(base)(x), alone, rtol=1e-4, atol=1e-5 * float(alone.abs().max()))
    model.close()
    assert torch.equal(linear_of(base)(x), together)


def test_two_models_of_one_base_can_be_closed_in_any_order(folder):
    base = load_with_outliers(folder)
    x = torch.randn(2, 7, 64)
    before = linear_of(base)(x)
    first, second = MultiLoraModel(base), MultiLoraModel(base)
    apart = linear_of(base)(x)
    first.close()
    assert torch.equal(linear_of(base)(x), apart)
    second.close()
    assert torch.equal(linear_of(base)(x), before)


@torch.no_grad()
def test_rows_equal_peft_run_token_by_token(folder, tmp_path):
    base = load_with_outliers(folder)
    folders = write_adapters(folder, tmp_path)
    oracle = PeftOracle(base, folders)
    model = MultiLoraModel(base)
    for name, path in folders.items():
        model.load_adapter(name, path)
    ids = torch.randint(3, VOCAB_SIZE, (3, 9))
    rows = ["small", None, "large"]
    logits = model(ids, adapters=rows).logits
    for row in (0, 2):
        oracle.model.set_adapter(rows[row])
        cache, expected = None, []
        for token in ids[row]:
            output = oracle.model(input_ids=token[None, None], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            expected.append(output.logits[0, 0])
        assert_near(logits[row], torch.stack(expected), f"row {row}")
        assert_near(logits[row], model(ids[row : row + 1], adapters=[rows[row]]).logits[0], f"row {row} alone")


def test_the_warning_of_every_call_is_told_once_at_most(folder, caplog):
    model = MultiLoraModel(load_with_outliers(folder))
    with torch.no_grad():
        for _ in range(3):
            model.base(input_ids=torch.arange(3, 9)[None])
    assert sum("inputs will be cast" in record.message for record in caplog.records) <= 1


def test_gradients_flow_through_outliers_too(folder):
    base = load_with_outliers(folder)
    plain = copy.deepcopy(base)
    model = MultiLoraModel(base)
    x = torch.randn(2, 7, 64, requires_grad=True)
    linear_of(model.base)(x).sum().backward()
    weight = linear_of(plain).weight.data.float() * linear_of(plain).weight.SCB.view(-1, 1) / 127
    assert torch.allclose(x.grad, weight.sum(dim=0).expand_as(x), rtol=1e-3, atol=1e-4)
