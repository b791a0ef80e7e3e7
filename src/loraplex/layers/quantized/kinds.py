"""Linear modules whose weights are quantized by another library: which kinds are known, and what values they have.

Such a module stays in charge of W x, and adapters are added behind it (lora_layer.py), as PEFT does
(peft/tuners/lora/bnb.py, torchao.py, hqq.py). No product of ours reads its weight. Libraries are told by the names of
their classes, so that none has to be installed, or imported, to ask.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loraplex.kernels.packed_weight import PackedWeight
from loraplex.layers.quantized.cpu_order_4bit import first_weight


@dataclass(frozen=True, kw_only=True)
class QuantizedKind:
    """One way in which a library holds a linear module's weight."""

    name: str
    is_of: Callable[[nn.Module], bool]
    dequantize: Callable[[Any], Tensor]  # a module's weight [out, in]


def quantized_kind(module: nn.Module) -> QuantizedKind | None:
    """How the module's weight is quantized; None for any other module."""
    return next((kind for kind in KINDS if kind.is_of(module)), None)


def quantized_modules(base: nn.Module) -> Iterator[tuple[str, nn.Module, QuantizedKind]]:
    """Path, module and kind of all that are quantized."""
    for path, module in base.named_modules():
        kind = quantized_kind(module)
        if kind is not None:
            yield path, module, kind


def dequantized_weight(module: nn.Module) -> Tensor:  # [out, in]
    """The values of a quantized module's weight, as PEFT's `dequantize_module_weight` has them."""
    kind = quantized_kind(module)
    assert kind is not None, f"{type(module).__name__} is not quantized"
    with torch.no_grad():
        return kind.dequantize(module).detach()


def has_plain_weight(module: nn.Module) -> bool:
    """Whether the weight's memory holds its values as they are, or in an order of ours."""
    weight = getattr(module, "weight", None)
    return type(weight) in (nn.Parameter, Tensor) or isinstance(weight, PackedWeight)


def num_weights(base: nn.Module) -> int:
    """The weights of a model, a quantized one counted as what it stands for."""
    modules = [module for _, module, _ in quantized_modules(base)]
    held = {id(held) for m in modules for name, held in m.named_parameters(recurse=False) if name != "bias"}
    counts = [parameter.numel() for parameter in base.parameters() if id(parameter) not in held]
    return sum(counts) + sum(map(_stands_for, modules))


def _stands_for(module: Any) -> int:
    return int(module.in_features * module.out_features)


def rounds_inputs(base: nn.Module) -> bool:
    """Whether a quantized module computes with fewer bits than the model's dtype has: small errors become steps."""
    return any(_rounds_inputs(module) for _, module, _ in quantized_modules(base))


def _rounds_inputs(module: Any) -> bool:
    if BNB_INT8.is_of(module):
        return True
    narrow = (torch.float16, torch.bfloat16)
    if getattr(module, "compute_dtype", None) in narrow:
        return True
    return BNB_4BIT.is_of(module) and getattr(module, "support_avx512bf16_for_cpu", False)


def is_class(value: object, package: str, name: str) -> bool:
    """Whether a value is of a package's class of this name, or of one below it."""
    return any(known.__name__ == name and known.__module__.split(".")[0] == package for known in type(value).__mro__)


# bitsandbytes


def _dequantize_4bit(module: Any) -> Tensor:
    from bitsandbytes import functional

    dequantized: Tensor = functional.dequantize_4bit(*first_weight(module))
    return dequantized


def _dequantize_int8(module: Any) -> Tensor:
    if module.state.has_fp16_weights:
        return module.weight.data
    scales = module.weight.SCB if module.state.SCB is None else module.state.SCB
    values: Tensor = module.weight.data * scales.view(-1, 1).to(module.weight.device) / 127
    return values


# torchao, HQQ


def _dequantize_torchao(module: Any) -> Tensor:
    try:
        values: Tensor = module.weight.dequantize()
    except (AttributeError, NotImplementedError, RuntimeError):  # a layout that only its product reads
        values = _product_with_identity(module)
    return values


def _product_with_identity(module: Any) -> Tensor:
    one = torch.eye(module.in_features, dtype=module.weight.dtype, device=module.weight.device)
    values: Tensor = nn.functional.linear(one, module.weight).t()
    return values


def _is_torchao(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return isinstance(module, nn.Linear) and type(weight).__module__.split(".")[0] == "torchao"


BNB_4BIT = QuantizedKind(
    name="bitsandbytes 4-bit",
    is_of=lambda module: is_class(module, "bitsandbytes", "Linear4bit"),
    dequantize=_dequantize_4bit,
)
BNB_INT8 = QuantizedKind(
    name="bitsandbytes int8",
    is_of=lambda module: is_class(module, "bitsandbytes", "Linear8bitLt"),
    dequantize=_dequantize_int8,
)
TORCHAO = QuantizedKind(name="torchao", is_of=_is_torchao, dequantize=_dequantize_torchao)
HQQ = QuantizedKind(
    name="HQQ", is_of=lambda module: is_class(module, "hqq", "HQQLinear"), dequantize=lambda module: module.dequantize()
)
KINDS = (BNB_4BIT, BNB_INT8, TORCHAO, HQQ)
