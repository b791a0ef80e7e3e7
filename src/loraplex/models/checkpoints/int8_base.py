"""A base model whose linear weights are 8-bit integers: which modules hold them, and what the model says about it."""

import ctypes
import logging
from collections.abc import Mapping
from contextlib import suppress

import torch
from torch import nn
from transformers import PreTrainedModel

from loraplex.errors import BaseModelError, ConfigError
from loraplex.kernels.int8_weight import COLUMN, GROUP, can_be_int8, hold_int8
from loraplex.kernels.native import native_available
from loraplex.large_memory import LargeMemory
from loraplex.layers.base.modules import output_module

WEIGHTS = ("auto", "int8")  # auto: of the model's dtype
_MARK = "loraplex_weights"  # in the model's config, and so in a config.json that is saved with it

logger = logging.getLogger(__name__)


def check_weights(weights: str, dtype: torch.dtype | str, device: torch.device) -> torch.dtype | str:
    """The dtype to load with. Raises ConfigError for an unknown kind of weights, and where 8-bit ones can't be held."""
    if weights not in WEIGHTS:
        raise ConfigError(f"weights {weights!r} can't be used. Use one of {list(WEIGHTS)}.")
    if weights == "auto":
        return dtype
    if device.type != "cpu":
        raise ConfigError(f"8-bit weights are for a CPU, not for {str(device)!r}. Leave weights='int8' out on a GPU.")
    if dtype not in ("auto", torch.bfloat16):
        raise ConfigError(
            f"8-bit weights have bfloat16 beside them, not {str(dtype).removeprefix('torch.')}. Use dtype='bfloat16' "
            "or 'auto'."
        )
    if not native_available():
        raise ConfigError(
            "8-bit weights need the compiled kernel, which isn't there: it takes a C++ compiler, and LORAPLEX_NATIVE=1."
            " Install one, or leave weights='int8' out."
        )
    return torch.bfloat16


def int8_modules(base: PreTrainedModel) -> dict[str, nn.Linear]:
    """By path, the modules whose weights are held in 8 bits: plain linear ones of repeated layers, and the output.

    Raises BaseModelError for a model that has none.
    """
    lists = [path for path, module in base.named_modules() if isinstance(module, nn.ModuleList)]
    output = output_module(base)
    found = {}
    for path, module in base.named_modules():
        is_in_layer = any(path.startswith(f"{name}.") for name in lists)
        if (is_in_layer or path == output) and isinstance(module, nn.Linear) and can_be_int8(module):
            found[path] = module
    if not found:
        raise BaseModelError(
            f"{type(base).__name__} has no plain linear module in its layers, so none of its weights can be held in 8 "
            "bits. Leave weights='int8' out."
        )
    return found


def quantize_base(base: PreTrainedModel) -> None:
    """Hold the weights in 8 bits, one module after the other. A tied embedding keeps its table."""
    output, memory = output_module(base), LargeMemory()
    for path, module in int8_modules(base).items():
        hold_int8(module, memory, group_of(path == output))
    mark_as_int8(base)
    _return_memory()


def group_of(is_output: bool) -> int:
    """Inputs that share a scale: of the output layer fewer, as nothing behind it evens its errors out."""
    return GROUP if is_output else COLUMN


def mark_as_int8(base: PreTrainedModel) -> None:
    """Note in the model's config what its values are; they differ from the original's wherever they are saved."""
    for config in {id(config): config for config in (base.config, base.config.get_text_config(decoder=True))}.values():
        config.tie_word_embeddings = False  # the output layer has values of its own now
    setattr(base.config, _MARK, "int8, dequantized where they are saved")
    kept = _other_linear_weights(base)
    if kept:
        logger.info(
            "weights that stay in bfloat16: %s", ", ".join(f"{count} of {kind}" for kind, count in kept.items())
        )


def _other_linear_weights(base: PreTrainedModel) -> Mapping[str, int]:
    """How many modules of each class have a matrix that isn't held in 8 bits."""
    counts: dict[str, int] = {}
    for module in base.modules():
        matrices = [
            weight for weight in module.parameters(recurse=False) if type(weight) is nn.Parameter and weight.ndim > 1
        ]
        if matrices and not isinstance(module, nn.Embedding):
            counts[type(module).__name__] = counts.get(type(module).__name__, 0) + 1
    return counts


def _return_memory() -> None:
    """What the weights had before goes back to the system, where the C library can do that."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
