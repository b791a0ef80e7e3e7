"""A base model from a GGUF file: dequantized by transformers, or with its blocks of 8 bits (Q8_0) held as they are.

For the latter, transformers knows the file's settings and names. A block is 32 integers and a float16 scale, which is
what an Int8Weight has. Values that the file has in 16 or 32 bits become bfloat16, or are quantized where a module's
weights are held in 8 bits.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from huggingface_hub import hf_hub_download
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    modeling_gguf_pytorch_utils,
)

from loraplex.errors import BaseModelError
from loraplex.extras import install_command, missing_modules
from loraplex.kernels.int8_weight import Int8Weight
from loraplex.kernels.packed_weight import hold
from loraplex.large_memory import LargeMemory
from loraplex.layers.base.modules import output_module
from loraplex.models.checkpoints.gguf_settings import ROPE_FACTORS, complete_config, refuse_left_out
from loraplex.models.checkpoints.int8_base import group_of, int8_modules, mark_as_int8
from loraplex.validation import listed

SUFFIX = ".gguf"
SUPPORTED_TYPES = ("Q8_0", "F32", "F16", "BF16")
_BLOCK_VALUES = 32
_SCALE_BYTES = 2


def is_gguf_file(source: str | Path) -> bool:
    """Whether a base model is named by a GGUF file."""
    return str(source).endswith(SUFFIX) and os.path.isfile(os.path.expanduser(source))


def find_gguf_file(path_or_id: str | Path, name: str) -> str:
    """The path of a GGUF file in a folder, or of one that the hub has. Raises BaseModelError."""
    folder = Path(os.path.expanduser(path_or_id))
    if not name.endswith(SUFFIX):
        raise BaseModelError(f"gguf_file is {name!r}; a GGUF file's name ends with {SUFFIX!r}.")
    if os.path.isdir(folder):
        if not (folder / name).is_file():
            found = sorted(path.name for path in folder.glob(f"*{SUFFIX}"))
            raise BaseModelError(f"{str(folder)!r} has no file {name!r}; it has [{listed(found)}].")
        return str(folder / name)
    try:
        return hf_hub_download(str(path_or_id), name)
    except Exception as error:  # the hub raises all kinds, for names as well as for networks
        raise BaseModelError(
            f"{name!r} of {str(path_or_id)!r} is neither in a local folder nor to be had from the hub: "
            f"{type(error).__name__}: {error}. Give the path of a GGUF file."
        ) from error


def load_dequantized(file: Path, dtype: torch.dtype | str, device: torch.device) -> PreTrainedModel:
    """The model that a GGUF file holds, its values dequantized to `dtype`. Raises BaseModelError."""
    _require_reader(file)
    from gguf import GGUFReader

    reader = GGUFReader(file)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        config=_config(file, reader),
        dtype=torch.float32 if dtype == "auto" else dtype,
        quantization_config=GgufConfig(dequantize=True),
        local_files_only=True,
        output_loading_info=True,
    )
    model: PreTrainedModel = loaded[0]
    missing = sorted(loaded[1]["missing_keys"])
    if missing:
        raise BaseModelError(f"{file} lacks {missing[:3]}, which {type(model).__name__} needs.")
    refuse_left_out(file, [tensor.name for tensor in reader.tensors], _places(model, _architecture(reader))[0])
    for owner, name in ((model.config, "quantization_config"), (model, "hf_quantizer")):  # the weights are dense now
        if name in vars(owner):
            delattr(owner, name)
    moved: PreTrainedModel = loaded[0].to(device)
    return moved


def _config(file: Path, reader: Any) -> PreTrainedConfig:
    config: PreTrainedConfig = AutoConfig.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    complete_config(file, config, reader)
    return config


def _require_reader(file: Path) -> None:
    if missing_modules("smollm2"):
        raise BaseModelError(f"{str(file)!r} is read with the package gguf. Install it: {install_command('smollm2')}.")


def load_gguf(file: Path) -> PreTrainedModel:
    """The model that a GGUF file holds, with weights in 8 bits. Raises BaseModelError."""
    _require_reader(file)
    from gguf import GGUFReader

    reader = GGUFReader(file)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    _check_types(file, tensors)
    config = _config(file, reader)
    tensors.pop(ROPE_FACTORS, None)  # which the configuration has
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    _fill(file, model, tensors, _architecture(reader))
    mark_as_int8(model)
    return model


def _check_types(file: Path, tensors: Mapping[str, Any]) -> None:
    for name, tensor in tensors.items():
        if tensor.tensor_type.name not in SUPPORTED_TYPES:
            raise BaseModelError(
                f"{file}: {name!r} is quantized as {tensor.tensor_type.name}. Types that can be read are "
                f"{', '.join(SUPPORTED_TYPES)}: give a Q8_0 file."
            )


def _fill(file: Path, model: PreTrainedModel, tensors: Mapping[str, Any], architecture: str) -> None:
    """Give every parameter its values, one after the other."""
    places, process = _places(model, architecture)
    unknown = sorted(tensors.keys() - places.keys())
    if unknown:
        raise BaseModelError(f"{file} has {unknown[:3]}, which {type(model).__name__} has no place for.")
    sources = {places[name]: tensor for name, tensor in tensors.items()}
    output, embedding = f"{output_module(model)}.weight", model.get_input_embeddings().weight
    for path, parameter in list(model.named_parameters()):
        if parameter is embedding and output not in sources:  # tied
            sources[output] = sources[path]
    in_8_bits = {f"{path}.weight": module for path, module in int8_modules(model).items()}
    memory = LargeMemory()
    for path, tensor in sources.items():
        if path not in in_8_bits:
            values = process(_floats(tensor), tensor.name).bfloat16()
            module, name = path.rpartition(".")[::2]
            setattr(model.get_submodule(module), name, nn.Parameter(values, requires_grad=False))
        elif tensor.tensor_type.name == "Q8_0":
            hold(in_8_bits[path], _from_blocks(file, tensor, process), memory)
        else:
            values = process(_floats(tensor), tensor.name)
            hold(in_8_bits[path], Int8Weight.of(values, group_of(path == output)), memory)
    missing = [path for path, parameter in model.named_parameters() if parameter.is_meta]
    if missing:
        raise BaseModelError(f"{file} lacks {missing[:3]}, which {type(model).__name__} needs.")


Process = Callable[[np.ndarray[Any, Any], str], Tensor]  # a tensor's values in the model's order


def _architecture(reader: Any) -> str:
    return str(modeling_gguf_pytorch_utils.read_field(reader, "general.architecture")[0])


def _places(model: PreTrainedModel, architecture: str) -> tuple[Mapping[str, str], Process]:
    """The parameters' paths by their names in the file, and what brings values into the model's order."""
    files = modeling_gguf_pytorch_utils
    kind = files.TENSOR_PROCESSORS.get(architecture, files.TensorProcessor)
    processor = kind(config=model.config.to_dict())
    names = files.get_gguf_hf_weights_map(model, processor)

    def process(values: np.ndarray[Any, Any], name: str) -> Tensor:
        ordered = processor.process(weights=values, name=name).weights
        return torch.from_numpy(np.require(ordered, requirements=["C", "W"]))  # the file itself isn't written to

    return names, process


def _floats(tensor: Any) -> np.ndarray[Any, Any]:
    from gguf import dequantize

    values: np.ndarray[Any, Any] = dequantize(tensor.data, tensor.tensor_type)
    return values


def _from_blocks(file: Path, tensor: Any, process: Process) -> Int8Weight:
    """The integers and scales of a Q8_0 tensor, its rows in the model's order."""
    blocks = tensor.data.reshape(len(tensor.data), -1, _SCALE_BYTES + _BLOCK_VALUES)
    rows = process(np.arange(len(blocks)).reshape(-1, 1), tensor.name).flatten()
    if not torch.equal(rows.sort().values, torch.arange(len(blocks))):
        raise BaseModelError(f"{file}: the rows of {tensor.name!r} aren't those of the model in another order.")
    scales = torch.from_numpy(blocks[..., :_SCALE_BYTES].copy().view(np.float16)[..., 0].astype(np.float32))
    values = torch.from_numpy(blocks[..., _SCALE_BYTES:].copy().view(np.int8).reshape(len(blocks), -1))
    return Int8Weight.from_values(values[rows], scales[rows], _BLOCK_VALUES)
