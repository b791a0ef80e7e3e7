"""Residual adapters as folders: residual_config.json and residual_model.safetensors (docs/linked-adapters.md)."""

import os.path
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from loraplex.adapters.atomic_dir import atomic_folder, check_destination
from loraplex.adapters.finite import require_finite
from loraplex.adapters.peft.record import RECORD_FILE, read_record, write_record
from loraplex.adapters.tensor_file import TensorFile, open_tensor_file
from loraplex.errors import AdapterFormatError, UnsupportedAdapterError
from loraplex.json_files import damaged_as
from loraplex.output_files import resolved
from loraplex.residual.format_settings import CONFIG_FILE, InterventionSettings, ResidualSettings, read_settings
from loraplex.residual.gates import GateResidual
from loraplex.residual.modules import (
    FunctionResidual,
    LinkedLayer,
    LinkedResidual,
    Residual,
    ResidualConfig,
    SteeringVector,
)
from loraplex.residual.reft import Intervention, ReftResidual
from loraplex.validation import listed

WEIGHTS_FILE = "residual_model.safetensors"

FolderResidual = LinkedResidual | SteeringVector | ReftResidual | GateResidual  # what a folder may hold

_REPLACEABLE = {CONFIG_FILE, WEIGHTS_FILE, RECORD_FILE, "README.md"}


def is_residual_folder(folder: str | Path) -> bool:
    """Whether a folder holds a residual adapter rather than a LoRA."""
    return os.path.isfile(Path(folder) / CONFIG_FILE)  # False for a name that is too long, too


def read_residual(folder: str | Path, *, check: Callable[[ResidualSettings], None] | None = None) -> FolderResidual:
    """Read a residual adapter, everything checked: settings, names, shapes and numbers.

    `check` sees the settings before a tensor is read, and may raise: a few bytes can ask for more memory than there is.
    Raises AdapterFormatError (files missing, damaged or not matching each other) and UnsupportedAdapterError (another
    version of the format).
    """
    folder = Path(folder)
    with damaged_as(AdapterFormatError, folder):
        return _read(folder, check)


def _read(folder: Path, check: Callable[[ResidualSettings], None] | None) -> FolderResidual:
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not os.path.isfile(folder / name):
            found = listed(path.name for path in folder.iterdir()) if os.path.isdir(folder) else "nothing"
            raise AdapterFormatError(
                f"{str(folder)!r} has no {name}; it holds {found}. A residual adapter is a folder with {CONFIG_FILE} "
                f"and {WEIGHTS_FILE}."
            )
    settings = read_settings(folder)
    if check is not None:
        check(settings)
    with open_tensor_file(folder / WEIGHTS_FILE) as file:
        shapes = settings.shapes
        _check_entries(file, shapes)
        tensors = {name: file.read(name) for name in shapes}
    for name, tensor in tensors.items():
        require_finite(tensor, f"{folder / WEIGHTS_FILE}: {name!r}")
    return _made_of(settings, tensors, read_record(folder) if settings.kind in ("linked", "reft") else ())


def _made_of(settings: ResidualSettings, tensors: Mapping[str, Tensor], end_tokens: tuple[int, ...]) -> FolderResidual:
    base = settings.base
    if settings.kind == "vector":
        vectors = {layer: tensors[f"layers.{layer}.vector"] for layer in settings.layers}
        return SteeringVector(vectors=vectors, base=base, site=settings.site, positions=settings.positions)
    if settings.kind == "reft":
        own = tuple(_intervention(n, one, tensors) for n, one in enumerate(settings.interventions))
        return ReftResidual(interventions=own, base=base, end_tokens=end_tokens)
    if settings.kind == "gate":
        inputs = {path: tensors[f"inputs.{path}"] for path in settings.inputs}
        outputs = {path: tensors[f"outputs.{path}"] for path in settings.outputs}
        return GateResidual(inputs=inputs, outputs=outputs, base=base)
    assert settings.config is not None, "a linked residual has a rank"
    assert base is not None, "a linked residual has a base model"
    layers = {
        layer: LinkedLayer(
            a=tensors[f"layers.{layer}.a"],
            b=tensors[f"layers.{layer}.b"],
            head_logits=tensors[f"layers.{layer}.head_logits"],
        )
        for layer in settings.layers
    }
    return LinkedResidual(config=settings.config, layers=layers, base=base, end_tokens=end_tokens)


def _intervention(n: int, own: InterventionSettings, tensors: Mapping[str, Tensor]) -> Intervention:
    return Intervention(
        block=own.layer,
        site=own.site,
        positions=own.positions,
        subtracts=own.subtracts,
        r=tensors[f"interventions.{n}.r"],
        w=tensors[f"interventions.{n}.w"],
        b=tensors[f"interventions.{n}.b"],
    )


def write_residual(residual: Residual, folder: str | Path, *, overwrite: bool = False) -> None:
    """Write a residual adapter, all or nothing. A function can't be written: register it where it is used.

    Raises AdapterExistsError (the folder exists and `overwrite` is False, or holds more than a residual adapter),
    AdapterFormatError (weights that `read_residual` would refuse) and UnsupportedAdapterError.
    """
    folder = resolved(folder)
    settings, tensors = _content(residual)
    expected = settings.shapes
    for name, tensor in tensors.items():
        require_finite(tensor, repr(name))
        if tuple(tensor.shape) != expected[name]:
            raise AdapterFormatError(f"{name!r} has shape {list(tensor.shape)}; expected {list(expected[name])}.")
    check = partial(check_destination, folder, "a residual adapter", _REPLACEABLE, overwrite=overwrite)
    with atomic_folder(folder, check) as temporary:
        (temporary / CONFIG_FILE).write_text(settings.as_json(), encoding="utf-8")
        write_record(temporary, residual.end_tokens if isinstance(residual, LinkedResidual | ReftResidual) else ())
        save_file(tensors, temporary / WEIGHTS_FILE, metadata={"format": "pt"})
        shutil.copymode(temporary / CONFIG_FILE, temporary / WEIGHTS_FILE)  # safetensors' own is for the owner only


def _content(residual: Residual) -> tuple[ResidualSettings, dict[str, Tensor]]:
    if isinstance(residual, FunctionResidual):
        raise UnsupportedAdapterError(
            "a function residual is Python code, which is not written to a folder. Register it under its name in the "
            "program that uses it."
        )
    base = residual.base
    if isinstance(residual, SteeringVector):
        tensors = {f"layers.{layer}.vector": _copy(vector) for layer, vector in residual.vectors.items()}
        size = base.hidden_size if base else len(next(iter(tensors.values())))
        place = {"site": residual.site, "positions": residual.positions}
        return ResidualSettings("vector", tuple(residual.vectors), base, hidden_size=size, **place), tensors  # type: ignore[arg-type]
    if isinstance(residual, ReftResidual):
        return _reft_content(residual)
    if isinstance(residual, GateResidual):
        gates = (("inputs", residual.inputs), ("outputs", residual.outputs))
        tensors = {f"{kind}.{path}": _copy(gate) for kind, own in gates for path, gate in own.items()}
        sizes = {kind: {path: gate.numel() for path, gate in own.items()} for kind, own in gates}
        return ResidualSettings("gate", (), base, inputs=sizes["inputs"], outputs=sizes["outputs"]), tensors
    tensors = {}
    for layer, weights in residual.layers.items():
        tensors[f"layers.{layer}.a"] = _copy(weights.a)
        tensors[f"layers.{layer}.b"] = _copy(weights.b)
        tensors[f"layers.{layer}.head_logits"] = _copy(weights.head_logits)
    layers = tuple(residual.layers)
    config = ResidualConfig(r=residual.config.r, alpha=residual.config.alpha, layers=layers)
    return ResidualSettings("linked", layers, base, config, hidden_size=residual.base.hidden_size), tensors


def _reft_content(residual: ReftResidual) -> tuple[ResidualSettings, dict[str, Tensor]]:
    own = residual.interventions
    entries = tuple(InterventionSettings(o.block, o.site, o.positions, o.rank, o.subtracts) for o in own)
    tensors = {
        f"interventions.{n}.{part}": _copy(tensor)
        for n, one in enumerate(own)
        for part, tensor in (("r", one.r), ("w", one.w), ("b", one.b))
    }
    layers = tuple(sorted(residual.layers))
    settings = ResidualSettings("reft", layers, residual.base, hidden_size=own[0].r.shape[1], interventions=entries)
    return settings, tensors


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format)


def _check_entries(file: TensorFile, shapes: dict[str, tuple[int, ...]]) -> None:
    missing, extra = shapes.keys() - file.entries.keys(), file.entries.keys() - shapes.keys()
    if missing or extra:
        raise AdapterFormatError(
            f"{file.path} doesn't hold what its settings say: missing {listed(missing) or 'none'}, extra "
            f"{listed(extra) or 'none'}."
        )
    wrong = {name: file.entries[name].shape for name, shape in shapes.items() if file.entries[name].shape != shape}
    if wrong:
        name = min(wrong)
        raise AdapterFormatError(
            f"{file.path}: {name!r} has shape {list(wrong[name])}; expected {list(shapes[name])} ({len(wrong)} tensors "
            "have wrong shapes)."
        )
