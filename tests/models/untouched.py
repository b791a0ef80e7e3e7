"""Refused calls leave a model with its adapters as it was."""

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from loraplex import MultiLoraModel, StoreConfig
from loraplex.errors import LoraplexError
from tests.tiny_models import VOCAB_SIZE, linear_targets, random_peft_adapter, tiny_model

IDS = torch.randint(3, VOCAB_SIZE, (4, 8), generator=torch.Generator().manual_seed(0))


def five_adapters_for_three_slots(folder: Path) -> MultiLoraModel:
    """A model of which "first", "second" and "alora" are in slots once `Untouched` has looked at it."""
    base = tiny_model("llama")
    model = MultiLoraModel(base, store=StoreConfig(num_slots=3))
    for seed, name in enumerate(("first", "second", "alora", "fourth", "fifth")):
        options = {"alora_invocation_tokens": [5], "task_type": "CAUSAL_LM"} if name == "alora" else {}
        path = random_peft_adapter(base, folder / name, targets=linear_targets("llama"), seed=seed, options=options)
        model.load_adapter(name, path)
    return model


class Untouched:
    """What must be the same before and after a refused call."""

    def __init__(self, model: MultiLoraModel) -> None:
        self.model = model
        self.logits = self.run()
        self.names, self.states = model.names(), model.adapters()
        self.layers = self.attached()

    @torch.no_grad()
    def run(self) -> Tensor:
        return self.model(IDS, adapters=["first", "second:0.5+first", "alora", None]).logits

    def attached(self) -> dict[str, tuple[type, int]]:
        """Each module's class and number of hooks."""
        modules = self.model.adaptable.modules
        return {path: (type(module), len(module._forward_hooks)) for path, module in modules.items()}

    def check(self) -> None:
        assert self.model.names() == self.names
        assert self.model.adapters() == self.states
        assert self.attached() == self.layers
        assert torch.equal(self.run(), self.logits)


def assert_refused(model: MultiLoraModel, call: Callable[[], object], error: type[LoraplexError], *words: str) -> None:
    before = Untouched(model)
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    for word in words:
        assert word in str(caught.value)
    before.check()


class BaseSnapshot:
    """Everything of a base model that loading could change, and transformers' registries of attention.

    Compare it after all was unloaded and detached.
    """

    def __init__(self, base: PreTrainedModel) -> None:
        self.base = base
        # Models of earlier tests that are garbage may still hold their part of the registries.
        gc.collect()
        self.registries = _registries()
        self.modules = self._modules()
        self.weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
        self.configs = self._configs()
        self.generation = _generation(base)

    def _modules(self) -> dict[str, tuple[object, ...]]:
        """Of each module: its class, the names and objects of its attributes, and all of its hooks."""
        return {path: _module_state(module) for path, module in self.base.named_modules()}

    def _configs(self) -> dict[int, tuple[dict[str, object], str]]:
        configs = [module.config for module in self.base.modules() if hasattr(module, "config")]
        return {id(config): (config.to_dict(), config._attn_implementation) for config in configs}

    def check(self) -> None:
        self.check_modules()
        weights = self.base.state_dict()
        assert weights.keys() == self.weights.keys()
        assert all(torch.equal(tensor, self.weights[name]) for name, tensor in weights.items())
        assert self._configs() == self.configs
        assert _generation(self.base) == self.generation
        assert not [name for name in vars(torch.nn.modules.module) if name.startswith("_global_") and _is_filled(name)]
        gc.collect()
        assert _registries() == self.registries

    def check_modules(self) -> None:
        now = self._modules()
        assert now.keys() == self.modules.keys()
        for path, state in self.modules.items():
            assert now[path] == state, f"module {path!r} is not as it was"


def _module_state(module: torch.nn.Module) -> tuple[object, ...]:
    # A tensor that is no parameter and no buffer is a state that a model's own pass writes.
    attributes = {name: Tensor if isinstance(value, Tensor) else id(value) for name, value in vars(module).items()}
    hooks = {name: list(value) for name, value in vars(module).items() if "hooks" in name and value is not None}
    tables = [{key: id(part) for key, part in vars(module)[name].items()} for name in ("_modules", "_parameters")]
    return type(module), module.training, attributes, hooks, tables


def _generation(base: PreTrainedModel) -> dict[str, object] | None:
    config = getattr(base, "generation_config", None)
    return config and config.to_dict()


def _registries() -> list[tuple[dict[str, object], dict[str, object]]]:
    return [
        (dict(registry._global_mapping), dict(vars(registry)))
        for registry in (AttentionInterface, AttentionMaskInterface)
    ]


def _is_filled(name: str) -> bool:
    return "hooks" in name and bool(getattr(torch.nn.modules.module, name))
