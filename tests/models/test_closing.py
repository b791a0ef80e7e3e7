"""A MultiLoraModel that is closed leaves the base model as it was before."""

from pathlib import Path

import pytest
import torch

from loraplex import MultiLoraModel
from loraplex.engine.config import EngineConfig
from loraplex.engine.engine import Engine
from loraplex.errors import AdapterNotFoundError
from loraplex.kernels.native import native_available
from loraplex.residual.capture import CaptureRequest
from loraplex.residual.registry import AttentionRequest
from tests.models.untouched import IDS, BaseSnapshot
from tests.residual.tiny_residuals import random_linked
from tests.tiny_models import linear_targets, random_peft_adapter, tiny_model

OPTIONS = {"max_new_tokens": 3, "do_sample": False}


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_the_base_model_is_what_it_was(name: str, tmp_path: Path) -> None:
    base = tiny_model(name)
    path = random_peft_adapter(tiny_model(name), tmp_path / "a", targets=linear_targets(name), seed=1)
    before = BaseSnapshot(base)
    with torch.no_grad():
        expected = base(input_ids=IDS).logits
    with MultiLoraModel(base) as model:
        model.load_adapter("a", path)
        model.load_residual("r", random_linked(model.registry.linked.layers, 1))
        model(IDS, adapters=["a", None, "r", "a+r"], attention=AttentionRequest(capture=CaptureRequest()))
        model.generate(IDS, torch.ones_like(IDS), adapters=["a", None, "r", "a+r"], **OPTIONS)
        with Engine(model, EngineConfig(cache_bytes=2**20, max_length=60)):
            pass
    before.check()
    assert model.names() == []
    with torch.no_grad():
        assert base(input_ids=IDS).logits.equal(expected)


def test_a_closed_model_refuses_what_it_has_no_more_and_may_be_used_again(tmp_path: Path) -> None:
    base = tiny_model("llama")
    path = random_peft_adapter(base, tmp_path / "a", targets=linear_targets("llama"), seed=1)
    model = MultiLoraModel(base, fast_decode=False)
    model.load_adapter("a", path)
    with torch.no_grad():
        expected = model(IDS, adapters=["a"] * 4).logits
        model.close()
        model.close()
        with pytest.raises(AdapterNotFoundError):
            model(IDS, adapters=["a"] * 4)
        model.load_adapter("a", path)
        assert model(IDS, adapters=["a"] * 4).logits.equal(expected)


@pytest.mark.skipif(not native_available(), reason="the compiled kernels can't be built here")
def test_one_of_two_models_on_a_base_that_closes_leaves_the_other_its_attention() -> None:
    base = tiny_model("llama")
    before = BaseSnapshot(base)
    first, second = MultiLoraModel(base, fast_decode=False), MultiLoraModel(base, fast_decode=False)
    residual = random_linked(first.registry.linked.layers, 1)
    first.load_residual("r", residual)
    second.load_residual("r", residual)
    with torch.no_grad():
        expected = first(IDS, adapters=["r", None, "r", None]).logits
        second.close()
        assert first(IDS, adapters=["r", None, "r", None]).logits.equal(expected)
    first.close()
    before.check()
