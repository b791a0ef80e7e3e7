"""A base model that was given back is, module by module, the one that was lent."""

import pytest
import torch

from loraplex import MultiLoraModel, XLoraConfig
from loraplex.errors import RequestError
from loraplex.xlora.two_pass.hooks import attach_two_pass
from tests.models.untouched import IDS, BaseSnapshot
from tests.tiny_models import embedding_target, linear_targets, random_peft_adapter, tiny_model


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
@torch.no_grad()
def test_nothing_is_left_of_adapters_and_mixtures(name, tmp_path):
    base = tiny_model(name)
    before, logits = BaseSnapshot(base), base(IDS).logits
    model = MultiLoraModel(base)
    targets = [*linear_targets(name), embedding_target(name)]
    for seed, adapter in enumerate(("a", "b")):
        model.load_adapter(
            adapter, random_peft_adapter(tiny_model(name), tmp_path / adapter, targets=targets, seed=seed)
        )
    invoked = {"alora_invocation_tokens": [5], "task_type": "CAUSAL_LM"}
    folder = random_peft_adapter(tiny_model(name), tmp_path / "c", targets=linear_targets(name), options=invoked)
    model.load_adapter("c", folder)
    model.create_mixture("mixture", ["a", "b"], XLoraConfig())
    model.create_mixture("other", ["b", "a"], XLoraConfig())
    rows = [None, "a:0.5+b", "c", "mixture"]
    model(IDS, adapters=rows)
    model.generate(IDS, adapters=rows, max_new_tokens=3)
    for loaded in ("mixture", "other", "a", "b", "c"):
        model.unload(loaded)
    model.close()
    before.check()
    assert torch.equal(base(IDS).logits, logits)


def test_two_passes_leave_no_hook():
    base = tiny_model("opt")
    before = BaseSnapshot(base)
    handles = attach_two_pass(base)
    assert len(handles) >= 3
    for handle in handles:
        handle.remove()
    before.check()


@torch.no_grad()
def test_adapters_of_a_model_that_was_detached_are_refused_until_their_layers_are_back(tmp_path):
    base = tiny_model("llama")
    model = MultiLoraModel(base)
    folder = random_peft_adapter(base, tmp_path / "a", targets=["q_proj"])
    model.load_adapter("a", folder)
    expected = model(IDS, adapters=["a"] * 4).logits
    model.create_mixture("mixture", ["a"], XLoraConfig())
    model.adaptable.detach()
    for row in ("a", "mixture"):
        with pytest.raises(RequestError, match="detached"):
            model(IDS, adapters=[row] * 4)
    assert torch.equal(model(IDS, adapters=[None] * 4).logits, base(IDS).logits)
    model.load_adapter("b", folder)  # which attaches the layers of the same modules
    assert torch.equal(model(IDS, adapters=["a"] * 4).logits, expected)
