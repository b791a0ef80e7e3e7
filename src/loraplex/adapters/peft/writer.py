"""Write a LoRA adapter as a folder in PEFT's format, all or nothing."""

import json
import shutil
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from loraplex.adapters.atomic_dir import atomic_folder, check_destination
from loraplex.adapters.finite import require_finite
from loraplex.adapters.peft.config import CONFIG_FILE, peft_settings
from loraplex.adapters.peft.parameters import as_in_file, wrapper_paths
from loraplex.adapters.peft.record import RECORD_FILE, write_record
from loraplex.adapters.peft.tensors import FACTORS, MAGNITUDE, PREFIX
from loraplex.adapters.peft.weight_files import WEIGHTS_FILE, weight_files
from loraplex.adapters.prompt_centroid import CENTROID_FILE
from loraplex.adapters.targets import expected_targets
from loraplex.adapters.tensor_file import FLOAT_DTYPES
from loraplex.adapters.weights import Adapter, LoraWeights
from loraplex.errors import AdapterFormatError, ConfigError, UnsupportedAdapterError
from loraplex.output_files import resolved
from loraplex.validation import listed

# What PEFT and we write; anything else is somebody's work.
REPLACEABLE = {CONFIG_FILE, WEIGHTS_FILE, RECORD_FILE, CENTROID_FILE, "README.md"}


def write_adapter(
    adapter: Adapter, folder: str | Path, dtype: torch.dtype | None = None, *, overwrite: bool = False
) -> None:
    """Write `adapter` so that PEFT and `read_adapter` read it back; `dtype` casts the factors.

    The files are written to a temporary folder beside `folder`, which then takes its name: no reader sees
    half an adapter. To overwrite, the old folder is moved aside first and removed last.

    Raises AdapterExistsError (the folder exists and `overwrite` is False, or it holds more than an adapter),
    AdapterFormatError and UnsupportedAdapterError (`read_adapter` would refuse the result, or PEFT drop a
    part).
    """
    reason = getattr(adapter, "no_lora_because", None)  # a residual says why it can't be written as a LoRA
    if reason is not None:
        raise UnsupportedAdapterError(
            f"a {type(adapter).__name__} can't be exported in PEFT's format or merged into weights: {reason}."
        )
    folder = resolved(folder)
    if dtype not in (None, *FLOAT_DTYPES.values()):
        raise ConfigError(f"dtype is {dtype}; supported: None and {list(FLOAT_DTYPES.values())}.")
    _check_writable(adapter)
    with atomic_folder(folder, partial(check_adapter_destination, folder, overwrite=overwrite)) as temporary:
        write_adapter_files(adapter, temporary, dtype)


def check_adapter_destination(folder: Path, *, overwrite: bool) -> None:
    """Raise AdapterExistsError where `write_adapter` would not write: for who asks before a long computation."""
    check_destination(folder, "an adapter", REPLACEABLE, overwrite=overwrite)


def peft_tensors(adapter: Adapter, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The adapter's tensors under PEFT's names and in its orientation, each a copy on the CPU."""
    tensors = {}
    wrappers = wrapper_paths(path for path, weights in adapter.layers.items() if weights.shape.is_parameter)
    for path, weights in adapter.layers.items():
        name_a, name_b = FACTORS[weights.kind]
        path = wrappers.get(path, path)
        tensors[f"{PREFIX}{path}.{name_a}"] = _copy(weights.lora_a, dtype)
        tensors[f"{PREFIX}{path}.{name_b}"] = _copy(as_in_file(weights.lora_b, weights.num_experts), dtype)
        if weights.magnitude is not None:
            tensors[f"{PREFIX}{path}.{MAGNITUDE}"] = _copy(weights.magnitude, None)
    return tensors


def _copy(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    tensor = tensor.detach().to("cpu", dtype or tensor.dtype)
    return tensor.clone(memory_format=torch.contiguous_format)


def write_adapter_files(adapter: Adapter, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write a checked adapter's files into an empty folder."""
    tensors = peft_tensors(adapter, dtype)
    for name, tensor in tensors.items():
        require_finite(tensor, repr(name))
    settings = json.dumps(peft_settings(adapter.config), indent=2, allow_nan=False)
    (folder / CONFIG_FILE).write_text(settings + "\n", encoding="utf-8")
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    write_record(folder, adapter.end_tokens)
    # safetensors makes its file readable by the owner only.
    shutil.copymode(folder / CONFIG_FILE, folder / WEIGHTS_FILE)


def _check_writable(adapter: Adapter) -> None:
    """Raise if `read_adapter` would not accept what `write_adapter` is asked to write."""
    config = adapter.config
    if config.target_modules is None and not config.target_parameters:
        raise UnsupportedAdapterError("the adapter's target_modules is None; set it to the adapted modules' names.")
    if not adapter.layers:
        raise AdapterFormatError("the adapter has no weights; nothing was written.")
    if not adapter.has_factors_alone:
        raise UnsupportedAdapterError(
            "the adapter brings more than factors (weights of the base model, biases or token rows), which is not "
            "written. Copy the folder that it was read from."
        )
    paths = tuple(adapter.layers)
    ranks, scalings = config.ranks_of(paths), config.scalings_of(paths)
    for path, weights in adapter.layers.items():
        _check_layer(path, weights, ranks[path], scalings[path], use_dora=config.use_dora)
    targeted = expected_targets(config, {path: weights.shape for path, weights in adapter.layers.items()})
    untargeted = adapter.layers.keys() - set(targeted)
    if untargeted:
        raise AdapterFormatError(
            f"the configuration doesn't target {listed(untargeted)}, so PEFT would drop their weights. Add "
            f"them to target_modules, which is {config.target_modules!r}, or target_parameters, which is "
            f"{config.target_parameters!r}."
        )


def _check_layer(path: str, weights: LoraWeights, rank: int, scaling: float, *, use_dora: bool) -> None:
    ranks = (weights.rank, weights.lora_b.shape[0] // weights.num_experts, rank)
    if len(set(ranks)) > 1:
        raise AdapterFormatError(
            f"{path!r}: lora_a has rank {ranks[0]}, lora_b {ranks[1]} and the configuration {ranks[2]}; all must agree."
        )
    if weights.scaling != scaling:
        raise AdapterFormatError(
            f"{path!r}: the LoRA scaling is {weights.scaling}, but the configuration gives "
            f"{scaling}. Set lora_alpha or alpha_pattern to match."
        )
    if use_dora != (weights.magnitude is not None):
        raise AdapterFormatError(
            f"{path!r}: use_dora is {use_dora}, but a magnitude is "
            f"{'' if weights.magnitude is not None else 'not '}there."
        )


def write_or_copy(adapter: Adapter | Path, folder: Path) -> None:
    """Write an adapter into a new folder, or copy the files of another folder's unchanged."""
    if isinstance(adapter, Adapter):
        write_adapter(adapter, folder)
        return
    folder.mkdir(parents=True)
    for file in adapter_files(adapter):
        shutil.copyfile(file, folder / file.name)


def adapter_files(folder: Path) -> list[Path]:
    """The files of an adapter in a folder."""
    files = [folder / CONFIG_FILE, *weight_files(folder), folder / RECORD_FILE]
    return [file for file in files if file.is_file()]
