"""Control vectors in GGUF, as repeng and llama.cpp write and read them.

`general.architecture` is "controlvector", and the tensor "direction.N" [hidden] is added to the output of block N, with
blocks counted from 0. Both agree: repeng writes the numbers of the blocks whose outputs it read
(`ControlVector.export_gguf`, `ControlModel.set_control`), llama.cpp adds direction N where it has built layer `il` = N
(`llama_adapter_cvec::apply`, `build_cvec`). llama.cpp refuses direction.0, and repeng makes none by default; it is read
here. `controlvector.model_hint` and `controlvector.layer_count` are informative: neither reader compares them.
"""

import logging
import os.path
import re
from pathlib import Path
from typing import Any

import torch

from loraplex.adapters.finite import require_finite
from loraplex.errors import AdapterFormatError, UnsupportedAdapterError
from loraplex.extras import require_extra
from loraplex.json_files import open_regular
from loraplex.output_files import whole_file
from loraplex.residual.modules import SteeringVector
from loraplex.validation import listed, quoted

ARCHITECTURE = "controlvector"
SUFFIX = ".gguf"
MAX_BYTES = 1 << 30  # a vector for each of 1000 blocks of a hidden size of 65536, four times over
_HEAD_BYTES = 4096
_HINT = f"{ARCHITECTURE}.model_hint"
_COUNT = f"{ARCHITECTURE}.layer_count"
_DIRECTION = re.compile(r"direction\.(\d{1,6})")

logger = logging.getLogger(__name__)


def is_gguf(source: str | Path) -> bool:
    """Whether it is called as a GGUF file is."""
    path = Path(source)
    return path.suffix == SUFFIX and os.path.isfile(path)


def is_control_vector(source: str | Path) -> bool:
    """Whether it is a GGUF file that says at its beginning, where writers put it, that it is a control vector."""
    if not is_gguf(source):
        return False
    try:
        with open_regular(Path(source)) as opened:
            head = opened.read(_HEAD_BYTES)
    except OSError:
        return False  # whoever reads it says what is wrong
    return head.startswith(b"GGUF") and ARCHITECTURE.encode() in head


def read_control_vector(file: str | Path, model_type: str | None = None) -> SteeringVector:
    """The vectors in a GGUF file, by block. Another `model_type` than the file's hint is told by a warning.

    Raises AdapterFormatError (damaged) and UnsupportedAdapterError (something else than a control vector).
    """
    file = Path(file)
    require_extra("smollm2", "a GGUF file")
    from gguf import GGUFReader

    try:
        with open_regular(file) as opened:  # not a pipe or a device, which GGUFReader would wait for
            num_bytes = opened.seek(0, 2)
        if num_bytes > MAX_BYTES:
            raise UnsupportedAdapterError(f"{file} has {num_bytes} bytes; a control vector has {MAX_BYTES} at most.")
        reader = GGUFReader(file)
        values = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    except UnsupportedAdapterError:
        raise
    except Exception as error:  # gguf raises all kinds for files that are damaged
        raise AdapterFormatError(f"{file} can't be read as GGUF: {type(error).__name__}: {error}.") from error
    kind = values.get("general.architecture")
    if kind != ARCHITECTURE:
        raise UnsupportedAdapterError(
            f"{file} has the architecture {quoted(kind)}; a control vector's is {ARCHITECTURE!r}. A LoRA in GGUF is "
            "converted first: loraplex convert FILE --base MODEL."
        )
    hint = values.get(_HINT)
    if model_type is not None and hint is not None and hint != model_type:
        logger.warning("%s was made for a model of the type %s; this one is %s", file, quoted(hint), model_type)
    vectors = {}
    for tensor in reader.tensors:
        number = _number(file, str(tensor.name))
        if number in vectors:
            raise AdapterFormatError(f"{file} has block {number} twice.")
        vectors[number] = _values(file, tensor)
    sizes = {len(vector) for vector in vectors.values()}
    if len(sizes) != 1:
        raise AdapterFormatError(f"{file} has directions of the sizes {sorted(sizes)}; a control vector's are alike.")
    return SteeringVector(vectors=dict(sorted(vectors.items())), base=None, site="block")


def write_control_vector(vector: SteeringVector, file: str | Path, model_type: str) -> None:
    """Write a vector on block outputs as a GGUF file, which must not exist; `model_type` is its hint.

    Raises UnsupportedAdapterError for what control vectors aren't, and OutputError.
    """
    require_extra("smollm2", "a GGUF file")
    from gguf import GGUFWriter

    if vector.site != "block" or vector.positions.which != "all" or 0 in vector.vectors:
        raise UnsupportedAdapterError(
            f"a control vector acts on the outputs of the blocks 1 and up, at all tokens; this one acts on "
            f"{vector.site!r} of the layers {sorted(vector.vectors)}, at {vector.positions}. Make it with "
            "--site block, without layer 0."
        )
    with whole_file(Path(file), lambda path: False) as temporary:
        writer = GGUFWriter(temporary, ARCHITECTURE)
        writer.add_string(_HINT, model_type)
        writer.add_uint32(_COUNT, len(vector.vectors))
        for number, values in sorted(vector.vectors.items()):
            writer.add_tensor(f"direction.{number}", values.detach().float().cpu().contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _number(file: Path, name: str) -> int:
    match = _DIRECTION.fullmatch(name)
    if match is None:
        raise AdapterFormatError(f"{file} has the tensor {listed([name])}; a control vector has direction.N alone.")
    return int(match.group(1))


def _values(file: Path, tensor: Any) -> torch.Tensor:
    if tensor.tensor_type.name not in ("F32", "F16") or len(tensor.data.shape) != 1:
        raise UnsupportedAdapterError(
            f"{file}: {tensor.name!r} is {tensor.tensor_type.name} {list(tensor.data.shape)}; directions are vectors "
            "in F32."
        )
    values = torch.from_numpy(tensor.data.copy()).float()
    require_finite(values, f"{file}: {tensor.name!r}")
    return values
