"""Quantized modules while adapters train: gradients flow through them, to the adapters of earlier layers."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn

from loraplex.errors import BaseModelError
from loraplex.layers.quantized.cpu_order_4bit import bring_into_cpu_order, is_in_cpu_order, restore_first_weight
from loraplex.layers.quantized.kinds import BNB_4BIT, dequantized_weight, quantized_modules
from loraplex.mapped_files import trim_heap

_M_MMAP_THRESHOLD = -3
_LARGE_BLOCK = 2**22  # bytes: weights of models that need it are larger, what is kept of some hundred tokens is smaller
_LARGEST_BLOCK = 2**25  # what glibc's own threshold rises to
_TOLERANCE = 3e-2  # of the largest gradient: those of 16 bits are rounded


@contextmanager
def quantized_modules_train(base: nn.Module) -> Iterator[None]:
    """Let quantized modules compute as in training, the others staying in evaluation mode.

    In evaluation mode, bitsandbytes puts 4-bit weights in an order for AVX512 through which no gradient flows, and
    multiplies 8-bit ones with rounded inputs. A weight in that order is put back meanwhile.

    A product dequantizes its weight, and frees the values. glibc would keep such blocks in its heap, where what is kept
    for the backward pass settles between them: in the end, memory for all weights dequantized at once. So large blocks
    are mapped, each by itself, as long as this runs.
    """
    modules = [(module, module.training) for _, module, _ in quantized_modules(base)]
    in_cpu_order = [module for module, _ in modules if BNB_4BIT.is_of(module) and is_in_cpu_order(module)]
    if modules:
        _map_blocks_from(_LARGE_BLOCK)
    try:
        for module in in_cpu_order:
            restore_first_weight(module)
            trim_heap()  # of the other order, as the next weight doesn't take its place
        for module, _ in modules:
            module.training = True
        yield
    finally:
        for module, was_training in modules:
            module.training = was_training
        for module in in_cpu_order:
            bring_into_cpu_order(module)
            trim_heap()
        if modules:
            _map_blocks_from(_LARGEST_BLOCK)


def _map_blocks_from(num_bytes: int) -> None:
    """Let the C library, where it is glibc, map blocks of this size and above (man 3 mallopt)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, num_bytes)


def check_gradients(base: nn.Module) -> None:
    """Raise BaseModelError where no gradient, or another one than W^T g, reaches a quantized module's input."""
    tried = set()
    for path, module, kind in quantized_modules(base):
        form = (kind.name, type(getattr(module, "weight", None)))
        if form in tried:
            continue
        tried.add(form)
        failure = _failure(module)
        if failure is not None:
            raise BaseModelError(
                f"adapters can't be trained on this base model: no gradient flows through {path!r}, whose weight "
                f"({kind.name}, {form[1].__name__}) is for inference only ({failure}). Load the model with weights "
                "that gradients flow through, such as BitsAndBytesConfig(load_in_4bit=True)."
            )


def _failure(module: Any) -> str | None:
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    values = dequantized_weight(module)
    x = torch.ones(2, module.in_features, dtype=values.dtype if values.is_floating_point() else dtype)
    x = x.to(values.device).requires_grad_()
    try:
        with torch.enable_grad():
            type(module).forward(module, x).sum().backward()
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        return str(error).splitlines()[0]
    expected = values.float().sum(dim=0).expand_as(x)
    if x.grad is None:
        return "it has none"
    apart = (x.grad.float() - expected).abs().max() / expected.abs().max()
    return None if apart <= _TOLERANCE else f"it is off by {apart:.1e}"
