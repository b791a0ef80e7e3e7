"""What an adapter's prompts look like to the base model: a small file beside its weights, for `adapters="auto"`."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from loraplex.adapters.tensor_file import TensorFile, open_tensor_file
from loraplex.errors import AdapterFormatError
from loraplex.json_files import parse_json
from loraplex.output_files import whole_file

CENTROID_FILE = "prompt_centroid.safetensors"
MAX_HIDDEN_SIZE = 1 << 20

_FORMAT = "loraplex_prompt_centroid"
_VERSION = 1
_TENSORS = ("background", "mean")


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptCentroid:
    """Means of the base model's last hidden state at a prompt's last token.

    Raises AdapterFormatError for vectors that are not finite, of different sizes, or the same.
    """

    mean: Tensor  # [hidden]  float32, over prompts that the adapter is for
    background: Tensor  # [hidden]  float32, over prompts about anything
    num_prompts: int  # that `mean` is of

    def __post_init__(self) -> None:
        for name in _TENSORS:
            vector: Tensor = getattr(self, name)
            if vector.ndim != 1 or len(vector) == 0 or vector.dtype != torch.float32 or not vector.isfinite().all():
                raise AdapterFormatError(
                    f"the prompt centroid's {name} has shape {list(vector.shape)}, dtype {vector.dtype} and "
                    f"{int((~vector.isfinite()).sum())} values that are not finite; expected [hidden], finite "
                    "torch.float32. Make it again with `loraplex auto fit`."
                )
        if self.mean.shape != self.background.shape or float(self.direction.norm()) == 0:
            raise AdapterFormatError(
                f"the prompt centroid's mean and background have sizes {len(self.mean)} and {len(self.background)}, "
                "or are the same vector, from which no direction follows. Make it again with `loraplex auto fit`."
            )

    @property
    def direction(self) -> Tensor:  # [hidden]
        """From prompts about anything to those of the adapter."""
        return self.mean - self.background if self.mean.shape == self.background.shape else torch.zeros(1)


def write_centroid(centroid: PromptCentroid, folder: str | Path) -> None:
    """Write the file into an adapter's or mixture's folder, as a whole. Raises OutputError."""
    tensors = {name: getattr(centroid, name).cpu().contiguous().clone() for name in _TENSORS}
    content = {"version": _VERSION, "num_prompts": centroid.num_prompts}
    metadata = {_FORMAT: json.dumps(content)}  # one entry: safetensors writes several in any order
    with whole_file(Path(folder) / CENTROID_FILE, _is_centroid) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def read_centroid(folder: Path) -> PromptCentroid | None:
    """The centroid in a folder; None without the file. Raises AdapterFormatError for a file that is something else."""
    path = folder / CENTROID_FILE
    if not path.exists():
        return None
    with open_tensor_file(path) as file:
        _check_entries(file)
        num_prompts = _num_prompts(file)
        return PromptCentroid(mean=file.read("mean"), background=file.read("background"), num_prompts=num_prompts)


def _num_prompts(file: TensorFile) -> int:
    metadata = file.metadata or {}
    try:
        content = parse_json(metadata.get(_FORMAT, ""))
    except ValueError:
        content = None
    found = content if isinstance(content, dict) else {}
    num_prompts = found.get("num_prompts")
    if found.get("version") != _VERSION or type(num_prompts) is not int or num_prompts < 1:
        raise AdapterFormatError(
            f"{file.path} has the metadata {str(metadata)[:200]}, not those of a prompt centroid, version {_VERSION}. "
            "Make it again with `loraplex auto fit`, or remove it."
        )
    return int(num_prompts)


def _check_entries(file: TensorFile) -> None:
    """Raise AdapterFormatError, before a tensor is read, for a file of other tensors."""
    found = {name: (entry.dtype, entry.shape) for name, entry in file.entries.items()}
    sizes = {shape for dtype, shape in found.values() if dtype == "F32" and len(shape) == 1}
    if tuple(sorted(found)) != _TENSORS or len(sizes) != 1 or not 0 < next(iter(sizes))[0] <= MAX_HIDDEN_SIZE:
        raise AdapterFormatError(
            f"{file.path} holds {str(found)[:200]}; a prompt centroid has the float32 vectors {list(_TENSORS)} of one "
            f"size, at most {MAX_HIDDEN_SIZE}. Make it again with `loraplex auto fit`, or remove it."
        )


def _is_centroid(path: Path) -> bool:
    try:
        with open_tensor_file(path) as file:
            return _FORMAT in (file.metadata or {})
    except AdapterFormatError:
        return False
