"""residual_config.json: what it says, checked (docs/linked-adapters.md has the format)."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from loraplex.errors import AdapterFormatError, ConfigError, UnsupportedAdapterError
from loraplex.json_files import MAX_SETTINGS_BYTES, read_json
from loraplex.residual.fingerprint import BaseFingerprint
from loraplex.residual.modules import ResidualConfig, check_layer_numbers
from loraplex.residual.positions import ALL, Positions, parse_positions
from loraplex.residual.reft import SITES, Site
from loraplex.validation import is_whole, quoted

CONFIG_FILE = "residual_config.json"
FORMAT = "loraplex-residual"
VERSIONS = (1, 2)
MAX_INTERVENTIONS = 1 << 16
MAX_SIZE = 1 << 31  # of hidden states and modules

Kind = Literal["linked", "vector", "reft", "gate"]

# By kind and version, what stands in the file besides format, format_version, kind and base.
_KEYS: Mapping[tuple[Kind, int], set[str]] = {
    ("linked", 1): {"layers", "r", "alpha"},
    ("vector", 1): {"layers"},
    ("vector", 2): {"layers", "hidden_size", "site", "positions"},
    ("reft", 2): {"hidden_size", "interventions"},
    ("gate", 2): {"inputs", "outputs"},
}
_COMMON = {"format", "format_version", "kind", "base"}
_BASE = {"architecture": str, "hidden_size": int, "vocab_size": int, "num_heads": list}
_INTERVENTION = {"layer", "site", "positions", "r", "subtracts"}


class InterventionSettings(NamedTuple):
    """One entry of "interventions"."""

    layer: int
    site: Site
    positions: Positions
    r: int
    subtracts: bool


class ResidualSettings(NamedTuple):
    """The content of a residual_config.json."""

    kind: Kind
    layers: tuple[int, ...]
    base: BaseFingerprint | None  # None: not known
    config: ResidualConfig | None = None  # of kind "linked"
    hidden_size: int = 0
    site: Site = "attention"  # of kind "vector"
    positions: Positions = ALL
    interventions: tuple[InterventionSettings, ...] = ()  # of kind "reft"
    inputs: Mapping[str, int] = {}  # of kind "gate": sizes by module path
    outputs: Mapping[str, int] = {}

    @property
    def version(self) -> int:
        """Of the format: the first that has what the residual needs."""
        is_first = (
            self.kind == "vector" and self.site == "attention" and self.positions == ALL and self.base is not None
        )
        return 1 if self.kind == "linked" or is_first else 2

    @property
    def rank(self) -> int:
        """The largest."""
        return max([1, *([self.config.r] if self.config else []), *(own.r for own in self.interventions)])

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the tensors beside it. Raises AdapterFormatError for layers that the base model doesn't have."""
        if self.kind == "vector":
            return {f"layers.{layer}.vector": (self.hidden_size,) for layer in self.layers}
        if self.kind == "gate":
            gates = (("inputs", self.inputs), ("outputs", self.outputs))
            return {f"{kind}.{path}": (size,) for kind, sizes in gates for path, size in sizes.items()}
        if self.kind == "reft":
            return {
                f"interventions.{n}.{part}": (own.r,) if part == "b" else (own.r, self.hidden_size)
                for n, own in enumerate(self.interventions)
                for part in ("r", "w", "b")
            }
        return self._linked_shapes()

    def _linked_shapes(self) -> dict[str, tuple[int, ...]]:
        assert self.config is not None, "a linked residual has a rank"
        assert self.base is not None, "a linked residual has a base model"
        rank, heads = self.config.r, self.base.num_heads
        shapes: dict[str, tuple[int, ...]] = {}
        for layer in self.layers:
            if layer >= len(heads):
                raise AdapterFormatError(
                    f"the settings name layer {layer} of a base model with {len(heads)} attention layers."
                )
            shapes[f"layers.{layer}.a"] = shapes[f"layers.{layer}.b"] = (rank, self.hidden_size)
            shapes[f"layers.{layer}.head_logits"] = (rank, heads[layer])
        return shapes

    def as_json(self) -> str:
        """The file's content."""
        content: dict[str, Any] = {"format": FORMAT, "format_version": self.version, "kind": self.kind}
        if self.config is not None:
            content |= {"r": self.config.r, "alpha": self.config.alpha}
        if self.kind in ("linked", "vector"):
            content |= {"layers": list(self.layers)}
        if self.kind == "gate":
            content |= {"inputs": dict(self.inputs), "outputs": dict(self.outputs)}
        elif self.version > 1:
            content |= {"hidden_size": self.hidden_size}
        if self.kind == "vector" and self.version > 1:
            content |= {"site": self.site, "positions": str(self.positions)}
        if self.kind == "reft":
            content |= {
                "interventions": [one._asdict() | {"positions": str(one.positions)} for one in self.interventions]
            }
        content |= {"base": None if self.base is None else self.base.as_json()}
        return json.dumps(content, indent=2, allow_nan=False) + "\n"


def read_settings(folder: Path) -> ResidualSettings:
    """Read and check `folder`/residual_config.json. Raises AdapterFormatError or UnsupportedAdapterError."""
    file = folder / CONFIG_FILE
    try:
        content = read_json(file, max_bytes=MAX_SETTINGS_BYTES)
    except (OSError, ValueError) as error:
        raise AdapterFormatError(f"{file} can't be read as JSON: {error}. Restore or write it again.") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise AdapterFormatError(f"{file} has the format {quoted(found)}; expected {FORMAT!r}.")
    version = content.get("format_version")
    if not is_whole(version) or version not in VERSIONS:
        raise UnsupportedAdapterError(
            f"{file} has format_version {quoted(version)}; this loraplex reads {list(VERSIONS)}. Use the loraplex that "
            "wrote it, or a newer one."
        )
    kind = content.get("kind")
    known = sorted(name for name, own in _KEYS if own == version)
    if not isinstance(kind, str) or kind not in known:
        raise UnsupportedAdapterError(f"{file} has the kind {quoted(kind)}; known in version {version}: {known}.")
    _check_keys(file, content, _COMMON | _KEYS[kind, version])
    try:
        return _settings(kind, version, content)
    except (ConfigError, TypeError, ValueError) as error:
        raise AdapterFormatError(f"{file}: {error}") from error


def _settings(kind: str, version: int, content: Mapping[str, Any]) -> ResidualSettings:
    base = None if content["base"] is None and version > 1 else _base(content["base"], needs_heads=version == 1)
    if kind == "linked":
        layers = _layers(content["layers"])
        config = ResidualConfig(r=content["r"], alpha=content["alpha"], layers=layers)
        return ResidualSettings("linked", layers, base, config, hidden_size=base.hidden_size if base else 0)
    if kind == "gate":
        return ResidualSettings("gate", (), base, inputs=_sizes(content["inputs"]), outputs=_sizes(content["outputs"]))
    if version == 1:
        assert base is not None, "version 1 has a base model"
        return ResidualSettings("vector", _layers(content["layers"]), base, hidden_size=base.hidden_size)
    hidden_size = _size(content["hidden_size"])
    if kind == "vector":
        site, positions = _site(content["site"]), parse_positions(content["positions"])
        layers = _layers(content["layers"])
        return ResidualSettings("vector", layers, base, hidden_size=hidden_size, site=site, positions=positions)
    own = content["interventions"]
    if not isinstance(own, list) or not 0 < len(own) <= MAX_INTERVENTIONS:
        raise ValueError(f"interventions is {quoted(own)}; it must be a list of some.")
    interventions = tuple(map(_intervention, own))
    layers = tuple(sorted({one.layer for one in interventions}))
    return ResidualSettings("reft", layers, base, hidden_size=hidden_size, interventions=interventions)


def _intervention(own: object) -> InterventionSettings:
    if not isinstance(own, dict) or own.keys() != _INTERVENTION:
        raise ValueError(f"interventions has {quoted(own)}; each must have {sorted(_INTERVENTION)}.")
    (layer,) = _layers([own["layer"]])
    rank = ResidualConfig(r=own["r"]).r
    if not isinstance(own["subtracts"], bool):
        raise TypeError(f"subtracts is {quoted(own['subtracts'])}; it must be true or false.")
    return InterventionSettings(layer, _site(own["site"]), parse_positions(own["positions"]), rank, own["subtracts"])


def _site(site: object) -> Site:
    found = next((known for known in SITES if known == site), None)
    if found is None:
        raise ValueError(f"site is {quoted(site)}; known: {list(SITES)}.")
    return found


def _sizes(sizes: object) -> dict[str, int]:
    if not isinstance(sizes, dict):
        raise TypeError(f"gates are {quoted(sizes)}; they must be sizes by module path.")
    return {path: _size(size) for path, size in sizes.items()}


def _size(size: object) -> int:
    if not is_whole(size) or not 0 < size < MAX_SIZE:  # type: ignore[operator]
        raise ValueError(f"a size is {quoted(size)}; it must be a whole number of at least 1.")
    return size  # type: ignore[return-value]


def _check_keys(file: Path, content: Mapping[str, Any], expected: set[str]) -> None:
    missing, unknown = sorted(expected - content.keys()), sorted(content.keys() - expected)
    if missing or unknown:
        raise AdapterFormatError(f"{file} lacks {missing} and has the unknown {unknown}; expected {sorted(expected)}.")


def _layers(layers: object) -> tuple[int, ...]:
    if not isinstance(layers, list):
        raise TypeError(f"layers is {quoted(layers)}; it must be a list of layer numbers.")
    check_layer_numbers("layers", tuple(layers))
    return tuple(layers)


def _base(base: object, *, needs_heads: bool) -> BaseFingerprint:
    if not isinstance(base, dict) or not base.keys() >= _BASE.keys() or base.keys() - _BASE.keys() - {"name"}:
        raise ValueError(f"base is {quoted(base)}; it must be an object with {sorted(_BASE)} and, if known, name.")
    for key, kind in _BASE.items():
        if type(base[key]) is not kind:
            raise TypeError(f"base.{key} is {quoted(base[key])}; it must be a JSON {kind.__name__}.")
    num_heads = tuple(base["num_heads"])
    sizes = (base["hidden_size"], base["vocab_size"], *num_heads)
    if (needs_heads and not num_heads) or not all(is_whole(size) and 0 <= size < 2**31 for size in sizes):
        raise ValueError(f"base is {quoted(base)}; its sizes must be whole numbers.")
    if base.get("name") is not None and not isinstance(base["name"], str):
        raise ValueError(f"base.name is {quoted(base['name'])}; it must be a text or null.")
    return BaseFingerprint(
        architecture=base["architecture"],
        hidden_size=base["hidden_size"],
        vocab_size=base["vocab_size"],
        num_heads=num_heads,
        name=base.get("name"),
    )
