"""Tensors from a pickle file (.bin, .pt), without running the code that it may hold.

`torch.load(weights_only=True)` builds tensors and plain containers and refuses everything else. What a file can cost is
bounded before: its parts are stored uncompressed, and its tensors may not be larger than it.
"""

import pickle
import zipfile
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from loraplex.adapters.tensor_file import FLOAT_DTYPES
from loraplex.errors import AdapterFormatError, UnsupportedAdapterError
from loraplex.json_files import open_regular
from loraplex.validation import listed, quoted

MAX_BYTES = 64 << 30
MAX_PICKLE_BYTES = 64 << 20  # of the file's list of tensors
MAX_TENSORS = 1 << 20


def read_pickled(file: Path, *, left_out: Collection[str] = ()) -> dict[str, Tensor]:
    """The state dict in `file`, as PEFT wrote it before it had safetensors, without what is `left_out`.

    Raises AdapterFormatError (damaged, or no state dict) and UnsupportedAdapterError (too large, older than torch 1.6,
    or with anything but tensors).
    """
    try:
        with open_regular(file) as opened:
            num_bytes = _check_size(file, opened.seek(0, 2))
            opened.seek(0)
            content = torch.load(opened, map_location="cpu", weights_only=True)
    except (OSError, ValueError, RuntimeError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise AdapterFormatError(
            f"{file} can't be read: {type(error).__name__}: {error}. Copy or download it again."
        ) from error
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise UnsupportedAdapterError(
            f"{file} holds more than tensors, which could run code: {reason}. Save the state dict alone, with "
            "torch.save(state_dict, file), where you trust it."
        ) from error
    return _checked(file, content, num_bytes, left_out)


def _check_size(file: Path, num_bytes: int) -> int:
    if num_bytes > MAX_BYTES:
        raise UnsupportedAdapterError(f"{file} has {num_bytes} bytes; at most {MAX_BYTES} are read.")
    if not zipfile.is_zipfile(file):
        raise UnsupportedAdapterError(
            f"{file} is no archive as torch.save writes since torch 1.6. Where you trust it, load it with torch and "
            "save it again."
        )
    with zipfile.ZipFile(file) as archive:
        parts = archive.infolist()
    packed = [part.filename for part in parts if part.compress_type != zipfile.ZIP_STORED]
    if packed or sum(part.file_size for part in parts) > num_bytes:
        raise UnsupportedAdapterError(
            f"{file} is compressed ({listed(packed)}), which torch.save never does. Save it again."
        )
    lists = sum(part.file_size for part in parts if part.filename.endswith(".pkl"))
    if lists > MAX_PICKLE_BYTES or len(parts) > MAX_TENSORS:
        raise UnsupportedAdapterError(f"{file} lists more tensors than an adapter has: {len(parts)}, in {lists} bytes.")
    return num_bytes


def _checked(file: Path, content: object, num_bytes: int, left_out: Collection[str]) -> dict[str, Tensor]:
    if not isinstance(content, dict):
        raise AdapterFormatError(
            f"{file} holds a {type(content).__name__}; an adapter's weights are a dict of tensors."
        )
    others = [quoted(name) for name, value in content.items() if not (isinstance(name, str) and type(value) is Tensor)]
    if others:
        raise AdapterFormatError(
            f"{file} holds values that are no tensors: {', '.join(others[:5])}. An adapter's weights are a dict of "
            "tensors."
        )
    kept = {name: tensor for name, tensor in content.items() if name not in left_out}
    wrong = [name for name, tensor in kept.items() if tensor.dtype not in FLOAT_DTYPES.values() or tensor.is_sparse]
    if wrong:
        raise UnsupportedAdapterError(
            f"{file}: {listed(wrong)} are not of floating point. Supported: {', '.join(FLOAT_DTYPES)}."
        )
    # A tensor may show one number many times.
    if sum(tensor.numel() * tensor.element_size() for tensor in content.values()) > 2 * num_bytes:
        raise AdapterFormatError(f"{file} holds tensors that are larger than the file. Save them as they are.")
    return kept
