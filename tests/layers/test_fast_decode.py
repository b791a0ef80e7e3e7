"""The compiled attention takes single-token steps that decode fast, and nothing else."""

import pytest
import torch

import loraplex.layers.attention.fast_decode as fast_decode
from loraplex import MultiLoraModel
from tests.tiny_models import VOCAB_SIZE, tiny_model

pytestmark = pytest.mark.needs("compiler")
IDS = torch.randint(3, VOCAB_SIZE, (2, 7), generator=torch.Generator().manual_seed(0))
OPTIONS = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}


@pytest.fixture
def calls(monkeypatch):
    """The masks of the compiled attention's calls."""
    masks = []
    real = fast_decode.attend_rows_native
    monkeypatch.setattr(fast_decode, "attend_rows_native", lambda *args: masks.append(args[3]) or real(*args))
    return masks


def test_single_token_steps_run_compiled(calls):
    model = MultiLoraModel(tiny_model("llama"))
    expected = tiny_model("llama").generate(IDS, attention_mask=torch.ones_like(IDS), **OPTIONS)
    assert calls == [], "a model by itself attends as it did"
    assert model.generate(IDS, torch.ones_like(IDS), **OPTIONS, packed=False).tolist() == expected.tolist()
    assert calls == [None] * 3 * model.base.config.num_hidden_layers  # the first new token comes from the prompt's pass


def test_left_padding_is_hidden(calls):
    model = MultiLoraModel(tiny_model("llama"))
    mask = torch.ones_like(IDS)
    mask[1, :3] = 0
    both = model.generate(IDS, mask, **OPTIONS, packed=False)
    assert [hidden.shape[1] for hidden in calls[:: model.base.config.num_hidden_layers]] == [8, 9, 10]
    alone = model.generate(IDS[1:, 3:], mask[1:, 3:], **OPTIONS, packed=False)
    assert both[1, 7:].tolist() == alone[0, 4:].tolist()


def test_forward_training_and_slow_decoding_keep_torchs(calls):
    fast, slow = MultiLoraModel(tiny_model("llama")), MultiLoraModel(tiny_model("llama"), fast_decode=False)
    slow.generate(IDS, torch.ones_like(IDS), **OPTIONS, packed=False)
    fast(IDS[:, :1])
    assert calls == []


def test_other_models_and_other_attention_keep_torchs(calls):
    model, other = MultiLoraModel(tiny_model("llama")), tiny_model("llama")
    eager = tiny_model("llama")
    eager.set_attn_implementation("eager")
    expected = other.generate(IDS, attention_mask=torch.ones_like(IDS), **OPTIONS)
    assert MultiLoraModel(eager).generate(IDS, torch.ones_like(IDS), **OPTIONS, packed=False).equal(expected)
    assert calls == []
    model.generate(IDS, torch.ones_like(IDS), **OPTIONS, packed=False)
    assert calls != []


def test_two_models_on_one_base_take_over_once(calls):
    base = tiny_model("llama")
    first, second = MultiLoraModel(base), MultiLoraModel(base)
    first.generate(IDS, torch.ones_like(IDS), **OPTIONS, packed=False)
    assert len(calls) == 3 * base.config.num_hidden_layers
    second.close()
    first.generate(IDS, torch.ones_like(IDS), **OPTIONS, packed=False)
    assert first.decodes_fast
