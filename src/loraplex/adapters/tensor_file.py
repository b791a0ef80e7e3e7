"""Read single tensors of a safetensors file into memory of their own."""

import copy
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from loraplex.errors import AdapterFormatError, UnsupportedAdapterError
from loraplex.json_files import damaged_as, open_regular, parse_json
from loraplex.validation import quoted

MAX_HEADER_BYTES = 16 << 20  # 80,000 tensors with long names
MAX_NAME = 1024  # characters of a tensor's name

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # how a pointer begins, which has some 130 bytes

FLOAT_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """Where one tensor lies in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int  # bytes from the start of the file
    num_bytes: int


class TensorFile:
    """An open safetensors file: what it holds is known without reading a tensor."""

    def __init__(self, path: Path, file: BufferedReader) -> None:
        self.path = path
        self._file = file
        self.num_bytes = os.fstat(file.fileno()).st_size
        entries, self.metadata = _parse_header(file)
        self.entries = {entry.name: entry for entry in entries}

    def renamed(self, names: Mapping[str, str]) -> "TensorFile":
        """The same file, while it is open, under other names: `names` has the present one of each tensor that stays."""
        view = copy.copy(self)
        view.entries = {name: self.entries[present] for name, present in names.items()}
        return view

    def read(self, name: str) -> Tensor:
        """Return a copy of one tensor, in the file's dtype.

        It is read, not mapped: a mapped file that is overwritten in place takes the whole process down.
        Raises UnsupportedAdapterError (not floating point) and AdapterFormatError (the file shrank
        meanwhile).
        """
        entry = self.entries[name]
        if entry.dtype not in FLOAT_DTYPES:
            raise UnsupportedAdapterError(
                f"{self.path}: tensor {name!r} has dtype {entry.dtype}. Supported: "
                f"{', '.join(FLOAT_DTYPES)}. Convert it."
            )
        tensor = torch.empty(entry.shape, dtype=FLOAT_DTYPES[entry.dtype])
        if entry.num_bytes:
            self._file.seek(entry.start)
            buffer = tensor.view(-1).view(torch.uint8).numpy().data
            if self._file.readinto(buffer) != entry.num_bytes:
                raise AdapterFormatError(f"{self.path} was changed while {name!r} was read. Load it again.")
        return tensor


@contextmanager
def open_tensor_file(path: Path) -> Iterator[TensorFile]:
    """Open a safetensors file; raises AdapterFormatError if it is truncated or not one."""
    with damaged_as(AdapterFormatError, path), open_regular(path) as file:
        _refuse_pointer(path, file)
        try:
            _check_header_size(file)
            # The opened file itself, whatever is at its path by now. It checks the whole header against the length.
            with safe_open(f"/dev/fd/{file.fileno()}", framework="np"):
                pass
            tensors = TensorFile(path, file)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            size = os.fstat(file.fileno()).st_size
            raise AdapterFormatError(
                f"{path} ({size} bytes) is not a whole safetensors file: {error}. Copy or download it again."
            ) from error
        yield tensors


def _refuse_pointer(path: Path, file: BufferedReader) -> None:
    start = file.read(len(_LFS_POINTER))
    file.seek(0)
    if start == _LFS_POINTER:
        raise AdapterFormatError(
            f"{path} is a Git LFS pointer, not the file itself, as a clone without Git LFS leaves it. Fetch the file: "
            "git lfs install && git lfs pull."
        )


def _check_header_size(file: BufferedReader) -> None:
    num_bytes = int.from_bytes(file.read(8), "little")
    file.seek(0)
    if num_bytes > MAX_HEADER_BYTES:
        raise ValueError(f"its header has {num_bytes} bytes, more than the {MAX_HEADER_BYTES} that are read")


def _parse_header(file: BufferedReader) -> tuple[list[TensorEntry], dict[str, str]]:
    """The format: 8 bytes length of the header, the header in JSON, the tensors."""
    header_bytes = int.from_bytes(file.read(8), "little")
    header = parse_json(file.read(header_bytes).decode())
    entries = []
    for name, fields in header.items():
        if name == "__metadata__":
            continue
        if len(name) > MAX_NAME or not name.isprintable():
            raise ValueError(f"the name {quoted(name)} is no tensor's: at most {MAX_NAME} printable characters")
        start, end = fields["data_offsets"]
        shape = tuple(fields["shape"])
        entry = TensorEntry(
            name=name,
            dtype=fields["dtype"],
            shape=shape,
            start=8 + header_bytes + start,
            num_bytes=end - start,
        )
        dtype = FLOAT_DTYPES.get(entry.dtype)
        if dtype is not None and math.prod(shape) * dtype.itemsize != entry.num_bytes:
            raise ValueError(f"{name!r} has {entry.num_bytes} bytes for shape {shape} of {entry.dtype}")
        entries.append(entry)
    return entries, header.get("__metadata__") or {}
