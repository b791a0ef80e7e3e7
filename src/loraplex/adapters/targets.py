"""Which modules of a base model an adapter's configuration targets, by PEFT's rules (PEFT 0.21)."""

import re
from collections.abc import Collection, Mapping
from dataclasses import replace

from loraplex.adapters.config import ALL_LINEAR, LoraConfig
from loraplex.adapters.weights import ModuleShape
from loraplex.errors import ConfigError


def expected_targets(
    config: LoraConfig, modules: Mapping[str, ModuleShape], *, output_module: str | None = None
) -> list[str]:
    """The paths that PEFT would adapt among `modules`, in their order.

    `modules` holds the base's linear and embedding modules by path. `output_module` is the path of its output
    embedding (lm_head), which "all-linear" leaves out. Raises ConfigError if target_modules is None: PEFT
    then chooses by architecture.
    """
    targets = config.target_modules
    if targets is None:
        raise ConfigError("target_modules is None; list the modules to adapt, or set 'all-linear'.")
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        linear = [path for path, module in modules.items() if module.kind == "linear" and path != output_module]
        config = replace(config, target_modules=tuple(linear))
    names = config.target_modules if isinstance(config.target_modules, str) else frozenset(config.target_modules or ())
    return [path for path in modules if not _is_excluded(config, path) and _is_targeted(config, names, path)]


def _is_excluded(config: LoraConfig, path: str) -> bool:
    excluded = config.exclude_modules
    if not excluded:
        return False
    if isinstance(excluded, str):
        return re.fullmatch(excluded, path) is not None
    return _ends_with_any(path, excluded)


def _is_targeted(config: LoraConfig, names: str | frozenset[str], path: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    if path in names:
        return True  # a full path is adapted whatever layers_to_transform says
    return _ends_with_any(path, names) and _is_in_layers(config, path)


def _ends_with_any(path: str, names: Collection[str]) -> bool:
    """Whether `path` is one of `names` or ends with one after a dot."""
    parts = path.split(".")
    return any(".".join(parts[start:]) in names for start in range(len(parts)))


def _is_in_layers(config: LoraConfig, path: str) -> bool:
    if not config.layers_to_transform:
        return True
    patterns = [rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\." for pattern in config.layers_pattern or ()]
    for pattern in patterns or [r".*?\.[^.]*\.(?P<idx>\d+)\."]:
        match = re.match(pattern, path)  # finds the first number: not the one of an expert inside the layer
        if match:
            return int(match["idx"]) in config.layers_to_transform
    return False
