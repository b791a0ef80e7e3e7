"""Read a LoRA adapter from a folder in PEFT's format."""

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from loraplex.adapters.config import LoraConfig
from loraplex.adapters.default_targets import with_default_targets
from loraplex.adapters.finite import require_finite
from loraplex.adapters.leftovers import restore_replaced
from loraplex.adapters.peft.base_layout import BaseLayout
from loraplex.adapters.peft.config import read_peft_config
from loraplex.adapters.peft.parameters import experts_of
from loraplex.adapters.peft.record import read_record
from loraplex.adapters.peft.tensors import ModuleTensors, base_copies, module_tensors, shape_of
from loraplex.adapters.peft.weight_files import check_files, open_weights
from loraplex.adapters.sharded_file import ShardedTensorFile
from loraplex.adapters.store.version import Fingerprint, folder_fingerprint
from loraplex.adapters.tensor_file import TensorFile
from loraplex.adapters.weights import Adapter, FileOffsets, LoraWeights, ModuleShape
from loraplex.errors import AdapterError, AdapterFormatError, BaseModelMismatchError
from loraplex.json_files import damaged_as

ShapeCheck = Callable[[LoraConfig, Mapping[str, ModuleShape]], None]

_MAX_READS = 20  # of a folder that is replaced again and again


def read_adapter(
    folder: str | Path,
    *,
    check_finite: bool = True,
    check_shapes: ShapeCheck | None = None,
    layout: BaseLayout | None = None,
    ignore_unknown: bool = False,
) -> Adapter:
    """Read the adapter in `folder` (adapter_config.json, adapter_model.safetensors and, if there, loraplex.json).

    The tensors keep the file's dtypes, are contiguous and own their memory. `check_finite=False` skips the
    search for NaN and infinite weights, for a file that passed it before. `check_shapes` sees settings and shapes
    before a tensor is read, and may raise: a few bytes can ask for more memory than there is. `layout` is of the base
    model that the adapter is for: null target_modules become PEFT's for its type, and modules get the names that they
    have in it now. Without it, both stay as they are in the folder. `ignore_unknown` leaves out unknown settings.

    Raises AdapterFormatError (files missing, damaged or not matching each other) and UnsupportedAdapterError
    (settings or file formats that can't be honoured exactly), before anything is returned. A folder that is replaced
    meanwhile is read again: settings and weights are always of one version.
    """
    folder = Path(folder)
    with damaged_as(AdapterFormatError, folder):
        restore_replaced(folder)
        for _ in range(_MAX_READS):
            before = _identity(folder)
            try:
                adapter = _read_files(folder, check_finite, check_shapes, layout, ignore_unknown)
            except (AdapterError, OSError):
                if _identity(folder) == before:
                    raise
                continue
            if _identity(folder) == before:
                return adapter
    raise AdapterFormatError(
        f"the files of {str(folder)!r} changed {_MAX_READS} times while they were read. Read it when its writer has "
        "ended."
    )


def _identity(folder: Path) -> tuple[int, Fingerprint]:
    """Changes when the folder or one of its files is replaced."""
    return (folder.stat().st_ino if folder.is_dir() else 0), folder_fingerprint(folder)


def _read_files(
    folder: Path,
    check_finite: bool,
    check_shapes: ShapeCheck | None,
    layout: BaseLayout | None,
    ignore_unknown: bool,
) -> Adapter:
    check_files(folder)
    config = read_peft_config(folder, ignore_unknown=ignore_unknown)
    if layout is not None:
        config = with_default_targets(config, layout.model_type)
    with open_weights(folder, layout) as file:
        modules = module_tensors(file, config)
        if check_shapes is not None:
            check_shapes(config, {path: shape_of(file, tensors) for path, tensors in modules.items()})
        scalings = config.scalings_of(tuple(modules))
        layers = {path: _read_module(file, tensors, scalings[path], check_finite) for path, tensors in modules.items()}
        places = _offsets(file, modules)
    return Adapter(config=config, layers=layers, places=places, end_tokens=read_record(folder))


def _offsets(file: TensorFile, modules: Mapping[str, ModuleTensors]) -> FileOffsets | None:
    """Where the factors are, if they are in one file."""
    if isinstance(file, ShardedTensorFile):
        return None
    starts = {
        path: (file.entries[tensors.lora_a].start, file.entries[tensors.lora_b].start)
        for path, tensors in modules.items()
    }
    return FileOffsets(file=file.path, num_bytes=file.num_bytes, starts=starts)


def read_base_copies(
    folder: str | Path, base: Mapping[str, Tensor] | None = None, *, layout: BaseLayout | None = None
) -> dict[str, Tensor]:
    """By parameter path ("lm_head.weight"), the copies of the base's own weights in `folder`.

    PEFT saves them beside adapted input and output embeddings and loads them into the base model; here they
    tell whether the base is the one the adapter was trained on (`check_base_copies`). Where `base` is given, copies of
    other shapes than its parameters' raise BaseModelMismatchError before they are read. `layout` as in `read_adapter`.
    """
    folder = Path(folder)
    with damaged_as(AdapterFormatError, folder):
        check_files(folder)
    with open_weights(folder, layout) as file:
        copies = base_copies(file)
        for parameter, name in copies.items():
            if base is not None:
                check_copy_shape(parameter, file.entries[name].shape, base)
        return {parameter: file.read(name) for parameter, name in copies.items()}


def check_copy_shape(path: str, shape: tuple[int, ...], base: Mapping[str, Tensor]) -> None:
    """Raise BaseModelMismatchError unless the base has a parameter of this path and shape."""
    if path not in base:
        raise BaseModelMismatchError(f"the adapter comes with {path!r}, which the base model doesn't have.")
    if shape != tuple(base[path].shape):
        raise BaseModelMismatchError(
            f"the adapter comes with {path!r} of shape {list(shape)}; in the base model it has "
            f"{list(base[path].shape)}. Load the base model that the adapter was trained on."
        )


def _read_module(file: TensorFile, tensors: ModuleTensors, scaling: float, check_finite: bool) -> LoraWeights:
    def read(name: str) -> Tensor:
        tensor = file.read(name)
        if check_finite:
            require_finite(tensor, f"{file.path}: {name!r}")
        return tensor

    return LoraWeights(
        kind=tensors.kind,
        lora_a=read(tensors.lora_a),
        lora_b=experts_of(read(tensors.lora_b), tensors.num_experts),
        scaling=scaling,
        magnitude=None if tensors.magnitude is None else read(tensors.magnitude),
        num_experts=tensors.num_experts,
    )
