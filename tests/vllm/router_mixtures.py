"""Mixtures with routers of every kind, as folders beside the adapters of a tiny Llama."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft

from loraplex import (
    ArrowConfig,
    LinearRouterConfig,
    MultiLoraModel,
    SpectrConfig,
    StaticRouterConfig,
    XLoraConfig,
)
from loraplex.routers.config import RouterConfig
from tests.tiny_models import LLAMA_TARGETS, random_peft_adapter

EQUAL = ("e0", "e1", "e2", "e3")  # experts of one rank and the same modules, as PEFT's Arrow wants them
DIFFERENT = ("protein", "materials", "chemistry")
KINDS: Mapping[str, tuple[tuple[str, ...], RouterConfig]] = {
    "arrow": (EQUAL, ArrowConfig(top_k=2, temperature=0.5)),
    "arrow_missing": (DIFFERENT, ArrowConfig(top_k=2)),
    "spectr": (DIFFERENT, SpectrConfig(top_k=2, temperature=0.7)),
    "linear": (DIFFERENT, LinearRouterConfig(temperature=2.0)),
    "linear_top_p": (EQUAL, LinearRouterConfig(top_p=0.6)),
    "sigmoid": (EQUAL, LinearRouterConfig(activation="sigmoid", top_k=3)),
    "static": (DIFFERENT, StaticRouterConfig(gates=(0.5, -0.3, 0.8))),
}


def add_router_mixtures(world: Any) -> MultiLoraModel:
    """Write every kind into the folder that the plugin serves; and loraplex's own model with all of them."""
    for i, expert in enumerate(EQUAL):
        folder = world.named / expert
        world.adapters[expert] = random_peft_adapter(world.base, folder, targets=LLAMA_TARGETS, seed=20 + i, r=4)
    model = MultiLoraModel.from_pretrained(world.model, dtype="float32")
    for name, folder in world.adapters.items():
        model.load_adapter(name, folder)
    for seed, (name, (experts, config)) in enumerate(KINDS.items()):
        model.create_mixture(name, experts, config, seed=seed)
        model.save_mixture(name, world.named / name)
    model.create_mixture("xlora", DIFFERENT, XLoraConfig(layerwise_scalings=True), seed=7)
    model.save_mixture("xlora", world.named / "xlora", layout="peft")
    world.mixtures["arrow"] = lambda: peft_arrow(world.base, {e: world.adapters[e] for e in EQUAL})
    return model


def peft_arrow(base: Any, folders: Mapping[str, Path]) -> Any:
    config = peft.tuners.lora.ArrowConfig(top_k=2, router_temperature=0.5, rng_seed=0)
    paths = [str(folder) for folder in folders.values()]
    return peft.tuners.lora.create_arrow_model(copy.deepcopy(base), paths, config).eval()
