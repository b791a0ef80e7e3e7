"""Link adapters: one adapter in the place of several, without the base model that they are for."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from loraplex.adapters.config import LoraConfig
from loraplex.adapters.factors_alone import require_factors_alone
from loraplex.adapters.fit import check_ranks
from loraplex.adapters.linking.combination import Combination
from loraplex.adapters.linking.modules import Weighted, combine_module
from loraplex.adapters.weights import Adapter, LoraWeights, ModuleShape
from loraplex.errors import BaseModelMismatchError, ConfigError

Members = Sequence[tuple[str, float, Adapter]]  # names, weights and adapters, in the link's order

_WHAT = "linked into one adapter"


def link_adapters(members: Members, combination: Combination | None = None) -> Adapter:
    """One plain LoRA, in float32, that is `members` with their weights, combined module by module.

    With "cat" (the default) it computes what the link computes; every other method changes that. Modules that only
    some of the adapters have are made of these.

    Raises UnsupportedAdapterError (DoRA, aLoRA, more than factors), BaseModelMismatchError (adapters of different
    bases) and ConfigError (a method that can't combine these).
    """
    combination = combination or Combination()
    if not members:
        raise ConfigError("there are no adapters to link. Name at least one.")
    _check_members(members, combination)
    paths = sorted({path for _, _, adapter in members for path in adapter.layers})
    ranks = [weights.rank for _, _, adapter in members for weights in adapter.layers.values()]
    generator = torch.Generator().manual_seed(combination.seed)
    layers = {}
    for path in paths:
        of_module = _having(members, path)
        layers[path] = combine_module(path, of_module, combination, combination.rank or max(ranks), generator)
    check_ranks({path: weights.rank for path, weights in layers.items()}, {p: w.shape for p, w in layers.items()})
    ends = [token for _, _, adapter in members for token in adapter.end_tokens]
    return Adapter(config=_config(members, layers), layers=layers, end_tokens=tuple(dict.fromkeys(ends)))


def _having(members: Members, path: str) -> Weighted:
    return [(weight, adapter.layers[path]) for _, weight, adapter in members if path in adapter.layers]


def _check_members(members: Members, combination: Combination) -> None:
    for name, _, adapter in members:
        require_factors_alone(name, adapter, _WHAT, dora=False)
    if len(members) == 1 and combination.pruning is not None:
        raise ConfigError(
            f"combination {combination.method!r} is for several adapters, but the link has {members[0][0]!r} alone "
            "(PEFT then uses 'linear', whatever is asked for). Use 'cat', 'linear' or 'svd'."
        )
    _check_bases(members)
    shapes: dict[str, tuple[str, ModuleShape]] = {}
    for name, _, adapter in members:
        for path, weights in adapter.layers.items():
            other, shape = shapes.setdefault(path, (name, weights.shape))
            if shape != weights.shape:
                raise BaseModelMismatchError(
                    f"adapters {other!r} and {name!r} are for different base models: {path!r} is {shape} in the one "
                    f"and {weights.shape} in the other. Link adapters of one base model."
                )


def _check_bases(members: Members) -> None:
    bases: dict[str, str] = {}
    for name, _, adapter in members:
        base = adapter.config.base_model_name_or_path
        if base:
            bases.setdefault(base, name)
    if len(bases) > 1:
        named = ", ".join(f"{name!r} for {base!r}" for base, name in bases.items())
        raise BaseModelMismatchError(
            f"the adapters are for different base models: {named}. Link adapters of one base model; where these are "
            "two names of one, write one of them into base_model_name_or_path of each adapter_config.json."
        )


# Settings


def _config(members: Members, layers: Mapping[str, LoraWeights]) -> LoraConfig:
    """The settings of the result: LoRA scaling 1 everywhere, and exactly its modules."""
    configs = [adapter.config for _, _, adapter in members]
    ranks = {path: weights.rank for path, weights in layers.items()}
    common, pattern = _rank_settings(ranks)
    return LoraConfig(
        r=common,
        lora_alpha=common,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        base_model_name_or_path=next((c.base_model_name_or_path for c in configs if c.base_model_name_or_path), None),
        task_type=next((config.task_type for config in configs if config.task_type), None),
        **_targets(members, layers),
    )


def _targets(members: Members, layers: Mapping[str, LoraWeights]) -> dict[str, Any]:
    """The adapters' own settings where all have the same modules by the same settings, else the paths of all modules.

    Without the base model a name shorter than a path can't be told to mean no other module of it.
    """
    options = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    settings = [{option: getattr(adapter.config, option) for option in options} for _, _, adapter in members]
    same_modules = all(adapter.layers.keys() == layers.keys() for _, _, adapter in members)
    if same_modules and all(other == settings[0] for other in settings):
        return settings[0]
    return {"target_modules": tuple(layers)}


def _rank_settings(ranks: Mapping[str, int]) -> tuple[int, dict[str, int]]:
    """The commonest rank, and a rank_pattern for the others: by the last name of a path where that is enough."""
    common = Counter(ranks.values()).most_common(1)[0][0]
    of_name: dict[str, set[int]] = {}
    for path, rank in ranks.items():
        of_name.setdefault(_last_name(path), set()).add(rank)
    pattern = {}
    for path in sorted(ranks, key=len, reverse=True):  # the first that matches counts, and a path may end with another
        name = _last_name(path)
        if len(of_name[name]) > 1:
            pattern[re.escape(path)] = ranks[path]
        elif ranks[path] != common:
            pattern[re.escape(name)] = ranks[path]
    return common, pattern


def _last_name(path: str) -> str:
    return path.rpartition(".")[2]
