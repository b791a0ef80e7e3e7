"""Which modules and parameters of a base model an adapter's configuration targets, by PEFT's rules (PEFT 0.21)."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from loraplex.adapters.config import ALL_LINEAR, LoraConfig, index_pattern
from loraplex.adapters.patterns import find_matches
from loraplex.adapters.weights import ModuleShape
from loraplex.errors import ConfigError


def expected_targets(
    config: LoraConfig, modules: Mapping[str, ModuleShape], *, output_module: str | None = None
) -> list[str]:
    """The paths that PEFT would adapt among `modules`, in their order.

    `modules` holds the base's linear and embedding modules and its adaptable parameters by path. `output_module` is the
    path of its output embedding (lm_head), which "all-linear" leaves out. Raises ConfigError if target_modules is None:
    PEFT then chooses by architecture.
    """
    parameters = set(targeted_parameters(config, [path for path, module in modules.items() if module.is_parameter]))
    modules = {path: module for path, module in modules.items() if not module.is_parameter or path in parameters}
    alone = {path: module for path, module in modules.items() if not module.is_parameter}
    targeted = parameters.union(_expected_modules(config, alone, output_module))
    return [path for path in modules if path in targeted]


def targeted_parameters(config: LoraConfig, paths: Iterable[str]) -> list[str]:
    """Those of the parameters `paths` that target_parameters names, wholly or from a dot on.

    PEFT's `_inject_parameters`, which asks for neither exclude_modules nor layers_to_transform.
    """
    names = frozenset(config.target_parameters or ())
    return [path for path in paths if names and _ends_with_any(path, names)]


def _expected_modules(config: LoraConfig, modules: Mapping[str, ModuleShape], output_module: str | None) -> list[str]:
    targets = config.target_modules
    if targets is None and config.target_parameters:
        return []
    if targets is None:
        raise ConfigError("target_modules is None; list the modules to adapt, or set 'all-linear'.")
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        linear = [path for path, module in modules.items() if module.kind == "linear" and path != output_module]
        config = replace(config, target_modules=tuple(linear))
    excluded = _excluded(config, tuple(modules))
    included = [path for path in modules if path not in excluded and not config.contents.excludes(path)]
    return _targeted(config, included)


def _excluded(config: LoraConfig, paths: Sequence[str]) -> Collection[str]:
    excluded = config.exclude_modules
    if not excluded:
        return ()
    if isinstance(excluded, str):
        return find_matches("exclude_modules", excluded, paths)
    return {path for path in paths if _ends_with_any(path, excluded)}


def _targeted(config: LoraConfig, paths: Sequence[str]) -> list[str]:
    if isinstance(config.target_modules, str):
        return list(find_matches("target_modules", config.target_modules, paths))
    names = frozenset(config.target_modules or ())
    ending = [path for path in paths if path not in names and _ends_with_any(path, names)]
    in_layers = _in_layers(config, ending)
    # a full path is adapted whatever layers_to_transform says
    return [path for path in paths if path in names or path in in_layers]


def _ends_with_any(path: str, names: Collection[str]) -> bool:
    """Whether `path` is one of `names` or ends with one after a dot."""
    parts = path.split(".")
    return any(".".join(parts[start:]) in names for start in range(len(parts)))


def _in_layers(config: LoraConfig, paths: Sequence[str]) -> set[str]:
    """Those of `paths` that layers_to_transform names; of several patterns the first that matches a path counts."""
    if not config.layers_to_transform:
        return set(paths)
    patterns = [index_pattern(pattern) for pattern in config.layers_pattern or ()]
    found: dict[str, str | None] = {}
    for pattern in patterns or [r".*?\.[^.]*\.(?P<idx>\d+)\."]:  # the first number: not that of an expert in the layer
        found |= find_matches("layers_pattern", pattern, [path for path in paths if path not in found], "match")
    wanted = set(config.layers_to_transform)
    return {path for path, number in found.items() if number is not None and int(number) in wanted}
