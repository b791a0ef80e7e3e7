"""Attaching LoRA layers changes nothing but what adapters add, and can be undone."""

import pytest
import torch
from torch import Tensor, nn

from loraplex import MultiLoraModel
from loraplex.adapters.config import LoraConfig
from loraplex.adapters.weights import Adapter, LoraWeights
from loraplex.errors import BaseModelMismatchError
from loraplex.layers.attach import AdaptableModel
from loraplex.layers.lora_linear import LoraLinear, become_lora_linear
from loraplex.routing.routing import use_routing
from loraplex.routing.rows import RowRouting
from tests.tiny_models import (
    HIDDEN_SIZE,
    TINY_MODELS,
    VOCAB_SIZE,
    embedding_target,
    linear_targets,
    random_peft_adapter,
    tiny_model,
)

IDS = torch.randint(3, VOCAB_SIZE, (2, 7), generator=torch.Generator().manual_seed(0))


def snapshot(model: nn.Module) -> dict[str, tuple[object, ...]]:
    """Each module's class, attributes and hooks."""
    return {
        path: (type(module), sorted(vars(module)), list(module._forward_hooks.values()))
        for path, module in model.named_modules()
    }


def logits_of(model: nn.Module) -> Tensor:
    extra = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(IDS, **extra).logits


@pytest.mark.parametrize("name", TINY_MODELS)
def test_base_model_is_the_same_with_adapters_loaded_and_as_it_was_when_they_are_detached(name, tmp_path):
    base = tiny_model(name)
    modules, keys, logits = snapshot(base), list(base.state_dict()), logits_of(base)
    weights = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    targets = [*linear_targets(name), embedding_target(name)]
    model = MultiLoraModel(base)
    model.load_adapter("a", random_peft_adapter(tiny_model(name), tmp_path / "a", targets=targets))
    assert snapshot(base) != modules
    assert list(base.state_dict()) == keys
    assert torch.equal(logits_of(base), logits)
    model.adaptable.detach()
    assert snapshot(base) == modules
    assert list(base.state_dict()) == keys
    assert all(torch.equal(tensor, weights[key]) for key, tensor in base.state_dict().items())
    assert torch.equal(logits_of(base), logits)


@pytest.mark.parametrize(
    ("name", "paths"),
    [
        ("llama", ["model.layers.1.self_attn.q_proj", "model.embed_tokens"]),
        ("gpt2", ["transformer.h.0.attn.c_attn", "lm_head"]),
    ],
)
def test_modules_that_are_not_attached_pay_nothing(name, paths):
    base = tiny_model(name)
    before = snapshot(base)
    AdaptableModel(base).attach(paths)
    after = snapshot(base)
    # The model itself tells each pass its length, and when it ends.
    assert {path for path in before if before[path] != after[path]} == {*paths, ""}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_attaching_twice_is_attaching_once(name):
    base = tiny_model(name)
    adaptable = AdaptableModel(base)
    adaptable.attach(adaptable.paths)
    once = snapshot(base)
    adaptable.attach(adaptable.paths)
    assert snapshot(base) == once
    adaptable.detach()
    adaptable.detach()
    adaptable.attach(adaptable.paths)
    assert [len(hooks) for _, _, hooks in snapshot(base).values()] == [len(hooks) for _, _, hooks in once.values()]


def test_several_adapters_of_a_module_share_its_layer(tmp_path):
    base = tiny_model("gpt2")
    model = MultiLoraModel(base)
    for seed in range(3):
        folder = random_peft_adapter(base, tmp_path / str(seed), targets=["c_attn"], seed=seed)
        model.load_adapter(f"adapter{seed}", folder)
    assert len(base.get_submodule("transformer.h.0.attn.c_attn")._forward_hooks) == 1


def adapter_for(path: str, in_features: int) -> Adapter:
    weights = LoraWeights(
        kind="embedding", lora_a=torch.randn(4, in_features), lora_b=torch.randn(4, HIDDEN_SIZE), scaling=1.0
    )
    return Adapter(config=LoraConfig(r=4, target_modules=(path,)), layers={path: weights})


def test_position_embedding_can_not_be_adapted():
    """It looks up positions, the same for all rows, so that its output belongs to no row."""
    model = MultiLoraModel(tiny_model("gpt2"))
    assert "transformer.wpe" not in model.adaptable.paths
    with pytest.raises(BaseModelMismatchError, match=r"'transformer\.wpe'"):
        model.load_adapter("a", adapter_for("transformer.wpe", 256))
    assert model.names() == []
    model.load_adapter("a", adapter_for("transformer.wte", VOCAB_SIZE))


def test_layer_that_is_attached_while_another_thread_runs_the_module_is_never_half_there():
    """Every change to the module is followed by a forward pass, as another thread might run it."""

    class Watched(nn.Linear):
        def __setattr__(self, name: str, value: object) -> None:
            super().__setattr__(name, value)
            if hasattr(self, "ready"):
                with use_routing(routing), torch.no_grad():
                    outputs.append(self(x))

    model = MultiLoraModel(tiny_model("llama"))
    routing = RowRouting([[], []], model.registry.bank)
    x, outputs = torch.randn(2, 3, 8), []
    module = Watched(8, 8)
    module.ready = True
    become_lora_linear(module, 0, "watched")
    assert isinstance(module, LoraLinear)
    assert len(outputs) >= 2
    assert all(torch.equal(y, outputs[0]) for y in outputs)
