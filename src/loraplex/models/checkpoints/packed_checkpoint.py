"""Loading GPTQ and AWQ checkpoints, each weight dequantized as the model takes it.

transformers runs such weights with a package that needs a GPU's build of torch. Here the model is loaded as one without
quantization: transformers asks for a tensor when it needs it, and is given the dequantized one.
"""

import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from loraplex.errors import BaseModelError
from loraplex.models.checkpoints.packed_formats import PARTS, PackedFormat, packed_format

_DTYPES = {"qweight": "I32", "qzeros": "I32", "g_idx": "I32"}
_SCALES = ("F16", "BF16", "F32")
_TRANSPOSED = ("gpt2", "openai-gpt")  # whose linear modules (Conv1D) have weights [in, out]
_INDEX = "model.safetensors.index.json"


def load_packed(
    source: str, config: PreTrainedConfig, auto_class: Any, dtype: torch.dtype | str, **options: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model with dequantized weights, and what transformers tells of the loading. Raises BaseModelError."""
    plain = copy.deepcopy(config)
    settings: Any = {}
    for part in (plain, plain.get_text_config(decoder=True)):
        if getattr(part, "quantization_config", None) is not None:
            settings = part.quantization_config
            del part.quantization_config
    packed = packed_format(settings if isinstance(settings, Mapping) else settings.to_dict())
    if dtype == "auto" and getattr(plain, "dtype", None) is None:
        dtype = torch.float16
    files = [safe_open(path, framework="pt") for path in _files(source)]
    tensors = _tensors(files, packed, transposed=config.model_type in _TRANSPOSED)
    with torch.device("meta"):
        kind = type(auto_class.from_config(plain))
    model, loading = kind.from_pretrained(
        None, config=plain, state_dict=tensors, dtype=dtype, output_loading_info=True, **options
    )
    left = [name for name in loading["unexpected_keys"] if name.endswith((".scales", *PARTS))]
    if left:  # of activations that are scaled, for example
        raise BaseModelError(
            f"the checkpoint has {sorted(left)[:3]}, which {type(model).__name__} without quantization doesn't take, "
            "so that it would compute something else. Use a checkpoint without quantization."
        )
    model.config.name_or_path = model.name_or_path = source
    if model.can_generate():
        model.generation_config = _generation_config(source, model)
    return model, loading


class PackedTensor:
    """A weight that is read and dequantized when transformers takes it."""

    def __init__(self, parts: Mapping[str, Any], packed: PackedFormat, name: str, *, transposed: bool) -> None:
        """Raises BaseModelError for parts that don't belong together; no tensor is read yet."""
        self._parts, self._packed, self._name, self._transposed = parts, packed, name, transposed
        kinds = {part: slice_.get_dtype() for part, slice_ in parts.items()}
        wrong = [part for part, dtype in _DTYPES.items() if part in kinds and kinds[part] != dtype]
        if kinds.get("scales") not in _SCALES or wrong or not {"qweight", "qzeros", "scales"} <= set(parts):
            raise self._damaged(f"its parts are {kinds}")
        try:
            num_out, num_in = packed.shape({part: tuple(slice_.get_shape()) for part, slice_ in parts.items()})
        except ValueError as error:
            raise self._damaged(str(error)) from error
        self.shape = torch.Size((num_in, num_out) if transposed else (num_out, num_in))

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def get_dtype(self) -> str:
        return "F32"

    def __getitem__(self, index: Any) -> Tensor:
        try:
            weight = self._packed.dequantize({part: slice_[:] for part, slice_ in self._parts.items()})
        except ValueError as error:
            raise self._damaged(str(error)) from error
        return (weight.t().contiguous() if self._transposed else weight)[index]

    def _damaged(self, what: str) -> BaseModelError:
        return BaseModelError(
            f"the quantized weight {self._name!r} can't be read: {what}. Check the checkpoint's quantization_config, "
            "or download it again."
        )


def _tensors(files: list[Any], packed: PackedFormat, *, transposed: bool) -> dict[str, Any]:
    """By name, the checkpoint's tensors, with `weight` in the place of a module's packed parts."""
    slices = dict(_slices(files))
    packed_modules = [name.removesuffix(".qweight") for name in slices if name.endswith(".qweight")]
    if not packed_modules:
        raise BaseModelError(
            f"the checkpoint says that it is quantized with {packed.method!r}, but has no packed weights (qweight)."
        )
    tensors = dict(slices)
    for module in packed_modules:
        parts = {part: tensors.pop(f"{module}.{part}") for part in PARTS if f"{module}.{part}" in tensors}
        name = f"{module}.weight"
        tensors[name] = PackedTensor(parts, packed, name, transposed=transposed)
    return tensors


def _slices(files: list[Any]) -> Iterator[tuple[str, Any]]:
    for file in files:
        for name in file.keys():  # noqa: SIM118  # it is no mapping
            yield name, file.get_slice(name)


def _files(source: str) -> list[str]:
    """The checkpoint's safetensors files, downloaded where need be."""
    optional: dict[str, Any] = {
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": False,
    }
    index = cached_file(source, _INDEX, **optional)
    names = ["model.safetensors"]
    if index is not None:
        names = sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
    found = [cached_file(source, name, **optional) for name in names]
    missing = [name for name, file in zip(names, found, strict=True) if file is None]
    if missing:
        raise BaseModelError(
            f"the checkpoint {source!r} has no {missing[0]}. Quantized weights are read from safetensors files of "
            "transformers' names alone: rename the file, or use another checkpoint."
        )
    return [str(file) for file in found]


def _generation_config(source: str, model: PreTrainedModel) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(source)
    except OSError:  # there is none
        return GenerationConfig.from_model_config(model.config)
