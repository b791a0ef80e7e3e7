"""Read a LoRA adapter from a folder in PEFT's format."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from loraplex.adapters.config import LoraConfig
from loraplex.adapters.finite import require_finite
from loraplex.adapters.leftovers import restore_replaced
from loraplex.adapters.peft.config import CONFIG_FILE, read_peft_config
from loraplex.adapters.peft.record import read_record
from loraplex.adapters.peft.tensors import FileTensors, ModuleTensors, file_tensors, shape_of
from loraplex.adapters.store.version import Fingerprint, folder_fingerprint
from loraplex.adapters.tensor_file import TensorFile, open_tensor_file
from loraplex.adapters.weights import Adapter, FileOffsets, LoraWeights, ModuleShape, TokenRows
from loraplex.errors import AdapterError, AdapterFormatError, UnsupportedAdapterError
from loraplex.json_files import damaged_as
from loraplex.validation import listed

WEIGHTS_FILE = "adapter_model.safetensors"

ShapeCheck = Callable[[LoraConfig, Mapping[str, ModuleShape]], None]


@dataclass(frozen=True, kw_only=True)
class ContentShapes:
    """What a file has beside factors."""

    replaced: Mapping[str, tuple[int, ...]]  # by parameter path of the base model
    token_rows: Mapping[str, tuple[int, ...]]  # by module path of an embedding


ContentCheck = Callable[[LoraConfig, ContentShapes], None]

_MAX_READS = 20  # of a folder that is replaced again and again
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def read_adapter(
    folder: str | Path,
    *,
    check_finite: bool = True,
    check_shapes: ShapeCheck | None = None,
    check_contents: ContentCheck | None = None,
) -> Adapter:
    """Read the adapter in `folder` (adapter_config.json, adapter_model.safetensors and, if there, loraplex.json).

    The tensors keep the file's dtypes, are contiguous and own their memory. `check_finite=False` skips the
    search for NaN and infinite weights, for a file that passed it before. `check_shapes` sees settings and shapes
    before a tensor is read, and may raise: a few bytes can ask for more memory than there is. `check_contents` sees the
    shapes of what comes beside factors (adapters/contents.py); without it, an adapter that brings such is refused, and
    copies of the base's weights beside adapted modules are left unread.

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
                adapter = _read_files(folder, check_finite, check_shapes, check_contents)
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
    folder: Path, check_finite: bool, check_shapes: ShapeCheck | None, check_contents: ContentCheck | None
) -> Adapter:
    check_files(folder)
    config = read_peft_config(folder, contents=check_contents is not None)
    with open_tensor_file(folder / WEIGHTS_FILE) as file:
        tensors = file_tensors(file, config, contents=check_contents is not None)
        if check_shapes is not None:
            check_shapes(config, {path: shape_of(file, own) for path, own in tensors.modules.items()})
        if check_contents is not None:
            check_contents(config, _content_shapes(file, tensors))
        read = _Reading(file, check_finite)
        scalings = config.scalings_of(tuple(tensors.modules))
        layers = {path: read.module(own, scalings[path]) for path, own in tensors.modules.items()}
        starts = {
            path: (file.entries[own.lora_a].start, file.entries[own.lora_b].start)
            for path, own in tensors.modules.items()
        }
        places = FileOffsets(file=file.path, num_bytes=file.num_bytes, starts=starts)
        adapter = Adapter(config=config, layers=layers, places=places, end_tokens=read_record(folder))
        return adapter if check_contents is None else read.contents(adapter, tensors)


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


def check_files(folder: Path) -> None:
    """Raise unless `folder` has both files of a PEFT adapter."""
    needed = f"An adapter in PEFT's format is a folder with {CONFIG_FILE} and {WEIGHTS_FILE}."
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise AdapterFormatError(f"adapter folder {str(folder)!r} {what}. {needed}")
    found = sorted(path.name for path in folder.iterdir())
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if (folder / file).is_file():
            continue
        pickles = [name for name in found if name.endswith(_PICKLE_SUFFIXES)]
        if file == WEIGHTS_FILE and pickles:
            raise UnsupportedAdapterError(
                f"adapter folder {str(folder)!r} has its weights in a pickle file ({listed(pickles)}), which "
                "can run code when it is read. Convert it where you trust it: "
                f"safetensors.torch.save_file(torch.load({pickles[0]!r}, weights_only=True), "
                f"{WEIGHTS_FILE!r})."
            )
        raise AdapterFormatError(f"adapter folder {str(folder)!r} has no {file}; it holds [{listed(found)}]. {needed}")


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
            lora_b=self.tensor(tensors.lora_b).t().contiguous(),
            scaling=scaling,
            magnitude=None if tensors.magnitude is None else self.tensor(tensors.magnitude),
            bias=None if tensors.bias is None else self.tensor(tensors.bias),
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
