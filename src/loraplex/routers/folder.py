"""A mixture with a router as a folder: router_config.json, a linear router's weights, experts in folders by name.

    {"format": "loraplex-router", "format_version": 1, "router": "arrow", "settings": {"top_k": 2, ..},
     "experts": ["protein", "materials"], "base_model_name_or_path": "..", "layers": ["model.layers.0...q_proj", ..]}

`layers` are a linear router's LoRA layers, whose weights [experts, in] and biases [experts] are in router.safetensors
under "weights.0", "biases.0", and so on; a shared router has one for each width of inputs, in the layers' order.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from loraplex.adapters.atomic_dir import atomic_folder, check_destination
from loraplex.adapters.names import check_name
from loraplex.adapters.peft.weight_files import ARROW_ROUTER, check_files
from loraplex.adapters.peft.writer import adapter_files, write_or_copy
from loraplex.adapters.prompt_centroid import CENTROID_FILE
from loraplex.adapters.tensor_file import TensorFile, open_tensor_file
from loraplex.adapters.weights import Adapter
from loraplex.errors import AdapterExistsError, AdapterFormatError, ConfigError, NameFormatError
from loraplex.json_files import damaged_as, read_object
from loraplex.output_files import resolved
from loraplex.routers.config import ArrowConfig, LinearRouterConfig, RouterConfig, SpectrConfig, StaticRouterConfig
from loraplex.routers.mixture import RoutedMixture
from loraplex.routers.peft_arrow import is_peft_arrow_folder, read_peft_arrow
from loraplex.routers.router import LinearRouter
from loraplex.validation import listed, quoted

SETTINGS_FILE = "router_config.json"
ROUTER_FILE = "router.safetensors"
FORMAT, FORMAT_VERSION = "loraplex-router", 1
MAX_EXPERTS = 4096

KINDS: Mapping[str, type[RouterConfig]] = {
    "arrow": ArrowConfig,
    "spectr": SpectrConfig,
    "linear": LinearRouterConfig,
    "static": StaticRouterConfig,
}
_KNOWN = {"format", "format_version", "router", "settings", "experts", "base_model_name_or_path", "layers"}


@dataclass(frozen=True, kw_only=True)
class RouterFolder:
    """A mixture with a router at rest."""

    folder: Path
    config: RouterConfig
    experts: Mapping[str, Path]  # in the router's order
    layers: tuple[str, ...]  # of a linear router
    base_model_name: str | None

    def read_router(self, widths: Mapping[str, int]) -> dict[str, Tensor]:
        """A linear router's state, for LoRA layers of these paths and inputs; of others nothing.

        Raises AdapterFormatError for other layers or shapes, before a tensor is read.
        """
        if not isinstance(self.config, LinearRouterConfig):
            return {}
        if self.layers != tuple(widths):
            raise AdapterFormatError(
                f"{self.folder / SETTINGS_FILE}: layers names {len(self.layers)} LoRA layers, but the experts adapt "
                f"{len(widths)} in this base model, or others. Load the base model and the experts that the router was "
                "trained with."
            )
        with open_tensor_file(self.folder / ROUTER_FILE) as file:
            shapes = _shapes(self.config.weight_widths(list(widths.values())), len(self.experts))
            _check_shapes(file, shapes)
            return {name: file.read(name).float() for name in shapes}


def is_router_folder(folder: Path) -> bool:
    """Whether a folder holds a mixture with a router, in loraplex's format or as PEFT's Arrow is saved.

    Raises AdapterFormatError if it can't be read.
    """
    with damaged_as(AdapterFormatError, folder):
        return (folder / SETTINGS_FILE).is_file() or is_peft_arrow_folder(folder)


def read_router_folder(folder: Path, *, find_experts: bool = True) -> RouterFolder:
    """Read settings and names; no tensors. `find_experts=False`: the experts come from elsewhere.

    Raises AdapterFormatError.
    """
    file = folder / SETTINGS_FILE
    with damaged_as(AdapterFormatError, folder):
        if not file.is_file():
            return _from_peft(folder, find_experts)
        content = read_object(file, AdapterFormatError)
        if content.get("format") != FORMAT or content.get("format_version") != FORMAT_VERSION:
            raise AdapterFormatError(
                f"{file}: format is {quoted(content.get('format'))}, version {quoted(content.get('format_version'))}. "
                f"Supported: {FORMAT!r}, {FORMAT_VERSION}."
            )
        unknown = sorted(content.keys() - _KNOWN)
        if unknown:
            raise AdapterFormatError(f"{file}: unknown settings {quoted(unknown)}. Known: {', '.join(sorted(_KNOWN))}.")
        names = _names(content.get("experts"), file)
        experts = {name: folder / name for name in names}
        if find_experts:
            for path in experts.values():
                check_files(path)
        layers = content.get("layers") or []
        if not isinstance(layers, list) or not all(isinstance(path, str) for path in layers):
            raise AdapterFormatError(f"{file}: layers is {quoted(layers)}; it must be a list of module paths.")
        name = content.get("base_model_name_or_path")
        return RouterFolder(
            folder=folder,
            config=_config(content, file),
            experts=experts,
            layers=tuple(layers),
            base_model_name=name if isinstance(name, str) else None,
        )


def _from_peft(folder: Path, find_experts: bool) -> RouterFolder:
    config, experts, base_model_name = read_peft_arrow(folder)
    _names(list(experts), folder / ARROW_ROUTER)
    if find_experts:
        for path in experts.values():
            check_files(path)
    return RouterFolder(folder=folder, config=config, experts=experts, layers=(), base_model_name=base_model_name)


def write_router_folder(
    folder: str | Path,
    mixture: RoutedMixture,
    experts: Mapping[str, Adapter | Path],  # in the router's order
    *,
    base_model_name: str | None,
    overwrite: bool = False,
) -> None:
    """Write a mixture so that `read_router_folder` reads it back, all or nothing.

    Raises AdapterExistsError (the folder is there and `overwrite` is False, or it holds something else), ConfigError.
    """
    folder, names = resolved(folder), list(experts)
    try:
        _names(names, folder)
    except AdapterFormatError as error:
        raise ConfigError(str(error)) from error
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "router": _kind(mixture.config),
        "settings": _settings(mixture.config),
        "experts": names,
        "base_model_name_or_path": base_model_name,
        "layers": list(mixture.layers) if isinstance(mixture.config, LinearRouterConfig) else [],
    }
    with atomic_folder(folder, lambda: _check_destination(folder, overwrite)) as temporary:
        (temporary / SETTINGS_FILE).write_text(json.dumps(content, indent=2) + "\n")
        if isinstance(mixture.router, LinearRouter):
            state = {name: tensor.detach().cpu().contiguous() for name, tensor in mixture.router.state_dict().items()}
            save_file(state, temporary / ROUTER_FILE)
        for name, expert in experts.items():
            write_or_copy(expert, temporary / name)


def _check_destination(folder: Path, overwrite: bool) -> None:
    """Raise unless nothing is at `folder`, or `overwrite` is set and nothing but a mixture in this format is there."""
    if folder.is_dir() and overwrite:
        own = {folder / SETTINGS_FILE, folder / ROUTER_FILE, folder / CENTROID_FILE}
        if (folder / SETTINGS_FILE).is_file():
            experts = read_router_folder(folder, find_experts=False).experts.values()
            own |= {file for path in experts if path.is_dir() for file in adapter_files(path)}
        others = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path not in own]
        if others:
            raise AdapterExistsError(
                f"{str(folder)!r} is not only a mixture, it holds {listed(others)}, so it is not replaced. Choose "
                "another folder, or move these files away."
            )
        return
    check_destination(folder, "a mixture", (), overwrite=overwrite)


def _kind(config: RouterConfig) -> str:
    return next(kind for kind, of_kind in KINDS.items() if isinstance(config, of_kind))


def _settings(config: RouterConfig) -> dict[str, Any]:
    """General experts are part of the experts by now."""
    settings = asdict(config)
    settings.pop("general_experts", None)
    return settings


def _config(content: Mapping[str, Any], file: Path) -> RouterConfig:
    kind, settings = content.get("router"), content.get("settings", {})
    if not isinstance(kind, str) or kind not in KINDS or not isinstance(settings, dict):
        raise AdapterFormatError(f"{file}: router is {quoted(kind)}. Supported: {', '.join(KINDS)}.")
    known = {field.name for field in fields(KINDS[kind])} - {"general_experts"}
    unknown = sorted(settings.keys() - known)
    if unknown:
        raise AdapterFormatError(f"{file}: settings has {quoted(unknown)}. Known: {', '.join(sorted(known))}.")
    try:
        return KINDS[kind](**{name: _as_tuple(value) for name, value in settings.items()})
    except (ConfigError, TypeError) as error:
        raise AdapterFormatError(f"{file}: {error}") from error


def _as_tuple(value: Any) -> Any:
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value


def _names(names: Any, file: Path) -> list[str]:
    """Expert names that are folders inside of the mixture's."""
    if not isinstance(names, list) or not 1 <= len(names) <= MAX_EXPERTS or len(set(map(str, names))) < len(names):
        raise AdapterFormatError(f"{file}: experts is {quoted(names)}; it must list different names.")
    for name in names:
        try:
            check_name(name)
        except NameFormatError as error:
            raise AdapterFormatError(f"{file}: {error}") from error
        parts = name.split("/")
        inside = [other for other in names if other != name and name.startswith(f"{other}/")]
        if any(part in ("", ".", "..") for part in parts) or inside or parts[0] in (SETTINGS_FILE, ROUTER_FILE):
            raise AdapterFormatError(f"{file}: expert {quoted(name)} has no folder of its own inside of the mixture's.")
    return names


def _shapes(widths: Sequence[int], num_experts: int) -> dict[str, tuple[int, ...]]:
    weights = {f"weights.{i}": (num_experts, width) for i, width in enumerate(widths)}
    return weights | {f"biases.{i}": (num_experts,) for i in range(len(widths))}


def _check_shapes(file: TensorFile, expected: Mapping[str, tuple[int, ...]]) -> None:
    found = {name: entry.shape for name, entry in file.entries.items()}
    wrong = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
    if wrong:
        raise AdapterFormatError(
            f"{file.path}: {wrong[0]!r} has shape {list(found.get(wrong[0], ()))}, expected "
            f"{list(expected.get(wrong[0], ()))}: [experts, inputs of the LoRA layer]. Restore the file."
        )
