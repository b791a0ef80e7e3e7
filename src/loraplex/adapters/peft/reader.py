"""Read a LoRA adapter from a folder in PEFT's format."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
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
from loraplex.adapters.peft.tensors import FileTensors, ModuleTensors, file_tensors, shape_of
from loraplex.adapters.peft.weight_files import check_files, open_weights
from loraplex.adapters.sharded_file import ShardedTensorFile
from loraplex.adapters.store.version import Fingerprint, folder_fingerprint
from loraplex.adapters.tensor_file import TensorFile
from loraplex.adapters.weights import Adapter, FileOffsets, LoraWeights, ModuleShape, TokenRows
from loraplex.errors import AdapterError, AdapterFormatError
from loraplex.json_files import damaged_as

ShapeCheck = Callable[[LoraConfig, Mapping[str, ModuleShape]], None]


@dataclass(frozen=True, kw_only=True)
class ContentShapes:
    """What a file has beside factors."""

    replaced: Mapping[str, tuple[int, ...]]  # by parameter path of the base model
    token_rows: Mapping[str, tuple[int, ...]]  # by module path of an embedding


ContentCheck = Callable[[LoraConfig, ContentShapes], None]

_MAX_READS = 20  # of a folder that is replaced again and again


def read_adapter(
    folder: str | Path,
    *,
    check_finite: bool = True,
    check_shapes: ShapeCheck | None = None,
    check_contents: ContentCheck | None = None,
    layout: BaseLayout | None = None,
    ignore_unknown: bool = False,
) -> Adapter:
    """Read the adapter in `folder` (adapter_config.json, adapter_model.safetensors and, if there, loraplex.json).

    The tensors keep the file's dtypes, are contiguous and own their memory. `check_finite=False` skips the
    search for NaN and infinite weights, for a file that passed it before. `check_shapes` sees settings and shapes
    before a tensor is read, and may raise: a few bytes can ask for more memory than there is. `check_contents` sees the
    shapes of what comes beside factors (adapters/contents.py); without it, an adapter that brings such is refused, and
    copies of the base's weights beside adapted modules are left unread.

    `layout` is of the base model that the adapter is for: null target_modules become PEFT's for its type, and modules
    get the names that they have in it now. Without it, both stay as they are in the folder. `ignore_unknown` leaves out
    unknown settings.

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
                adapter = _read_files(folder, check_finite, check_shapes, check_contents, layout, ignore_unknown)
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
    check_contents: ContentCheck | None,
    layout: BaseLayout | None,
    ignore_unknown: bool,
) -> Adapter:
    check_files(folder)
    config = read_peft_config(folder, ignore_unknown=ignore_unknown, contents=check_contents is not None)
    if layout is not None:
        config = with_default_targets(config, layout.model_type)
    with open_weights(folder, layout) as file:
        tensors = file_tensors(file, config, contents=check_contents is not None)
        if check_shapes is not None:
            check_shapes(config, {path: shape_of(file, own) for path, own in tensors.modules.items()})
        if check_contents is not None:
            check_contents(config, _content_shapes(file, tensors))
        read = _Reading(file, check_finite)
        scalings = config.scalings_of(tuple(tensors.modules))
        layers = {path: read.module(own, scalings[path]) for path, own in tensors.modules.items()}
        places = _offsets(file, tensors.modules)
        adapter = Adapter(config=config, layers=layers, places=places, end_tokens=read_record(folder))
        return adapter if check_contents is None else read.contents(adapter, tensors)


def _offsets(file: TensorFile, modules: Mapping[str, ModuleTensors]) -> FileOffsets | None:
    """Where the factors are, if they are in one file."""
    if isinstance(file, ShardedTensorFile):
        return None
    starts = {
        path: (file.entries[tensors.lora_a].start, file.entries[tensors.lora_b].start)
        for path, tensors in modules.items()
    }
    return FileOffsets(file=file.path, num_bytes=file.num_bytes, starts=starts)


def _content_shapes(file: TensorFile, tensors: FileTensors) -> ContentShapes:
    return ContentShapes(
        replaced={path: file.entries[name].shape for path, name in tensors.replaced.items()},
        token_rows={path: file.entries[name].shape for path, name in tensors.token_rows.items()},
    )


def content_shapes(adapter: Adapter) -> ContentShapes:
    """What an adapter has beside factors."""
    return ContentShapes(
        replaced={path: tuple(tensor.shape) for path, tensor in adapter.replaced.items()},
        token_rows={path: tuple(rows.values.shape) for path, rows in adapter.token_rows.items()},
    )


@dataclass(frozen=True)
class _Reading:
    """Reads tensors of one file."""

    file: TensorFile
    check_finite: bool

    def tensor(self, name: str) -> Tensor:
        """One tensor, of numbers."""
        tensor = self.file.read(name)
        if self.check_finite:
            require_finite(tensor, f"{self.file.path}: {name!r}")
        return tensor

    def module(self, tensors: ModuleTensors, scaling: float) -> LoraWeights:
        """One module's factors."""
        return LoraWeights(
            kind=tensors.kind,
            lora_a=self.tensor(tensors.lora_a),
            lora_b=experts_of(self.tensor(tensors.lora_b), tensors.num_experts),
            scaling=scaling,
            magnitude=None if tensors.magnitude is None else self.tensor(tensors.magnitude),
            bias=None if tensors.bias is None else self.tensor(tensors.bias),
            num_experts=tensors.num_experts,
        )

    def contents(self, adapter: Adapter, tensors: FileTensors) -> Adapter:
        """The adapter with what comes beside its factors, which was checked to be there."""
        config = adapter.config.contents
        return replace(
            adapter,
            replaced={path: self.tensor(name) for path, name in tensors.replaced.items()},
            token_rows={
                path: TokenRows(tokens=config.tokens_of(path), values=self.tensor(name))
                for path, name in tensors.token_rows.items()
            },
        )
