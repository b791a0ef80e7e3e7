"""Stacked bfloat16 weights of experts, each expert's held once, in the order in which the compiled product reads it.

As with a PackedWeight, of which every expert is one, products run on them as they lie: `weight[expert]`, and
transformers' grouped product (integrations/moe.py). Whatever else reads them sees the weights as they were.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from loraplex.kernels.packed_weight import PackedWeight, packed_size
from loraplex.large_memory import large_buffer

_TRANSPOSES = (Tensor.transpose, torch.transpose)
_GROUPED = (getattr(functional, "grouped_mm", None), getattr(torch, "_grouped_mm", None))


class PackedExperts(PackedWeight):
    """Frozen weights [experts, out, in]."""

    packed: Tensor  # [experts, ..]  bfloat16

    @staticmethod
    def __new__(cls, packed: Tensor, out: int, in_: int) -> "PackedExperts":
        make: Any = Tensor._make_wrapper_subclass
        made: PackedExperts = make(cls, (len(packed), out, in_), dtype=packed.dtype, device=packed.device)
        made.packed = packed
        return made

    @classmethod
    def of(cls, weight: Tensor) -> "PackedExperts":
        """Pack contiguous bfloat16 weights [experts, out, in] in a CPU's memory."""
        count, out, in_ = weight.shape
        size = packed_size(out, in_)
        packed = large_buffer(count * size * weight.itemsize).view(weight.dtype).view(count, size)
        made = cls(packed, out, in_)
        made.write(weight.detach())
        return made

    def alias(self) -> "PackedExperts":
        return PackedExperts(self.packed, *self.shape[1:])

    def write(self, weight: Tensor) -> None:
        for target, expert in zip(self.packed, weight, strict=True):
            target.copy_(torch.ops.loraplex.pack_weight(expert))

    def expert(self, number: int) -> PackedWeight:  # [out, in]
        """One expert's weight, in the same memory."""
        return PackedWeight(self.packed[number], *self.shape[1:])

    def unpack(self) -> Tensor:  # [experts, out, in]
        return torch.stack([self.expert(number).unpack() for number in range(len(self.packed))])

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is Tensor.__getitem__ and isinstance(args[0], PackedExperts) and _is_number(args[1]):
            return args[0].expert(int(args[1]))
        if func in _TRANSPOSES and not kwargs and {int(dim) % 3 for dim in args[1:]} == {1, 2}:
            return TransposedExperts(args[0])
        with torch._C.DisableTorchFunctionSubclass():  # results are plain tensors
            return func(*args, **(kwargs or {}))


class TransposedExperts(Tensor):
    """PackedExperts [experts, in, out], as a grouped product takes them."""

    experts: PackedExperts

    @staticmethod
    def __new__(cls, experts: PackedExperts) -> "TransposedExperts":
        count, out, in_ = experts.shape
        make: Any = Tensor._make_wrapper_subclass
        made: TransposedExperts = make(cls, (count, in_, out), dtype=experts.dtype, device=experts.device)
        made.experts = experts
        return made

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _GROUPED and func is not None:
            return _grouped(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        plain = [arg.experts.unpack().transpose(1, 2) if isinstance(arg, TransposedExperts) else arg for arg in args]
        return func(*plain, **(kwargs or {}))


def _is_number(index: object) -> bool:
    is_whole = isinstance(index, Tensor) and index.ndim == 0 and not index.is_floating_point()
    return is_whole or (isinstance(index, int) and not isinstance(index, bool))


def _grouped(
    x: Tensor,  # [pairs, in]
    weight: TransposedExperts,
    *,
    offs: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:  # [pairs, out]
    """Each expert's product with its pairs, which end at its number in `offs`; zeros behind the last one's."""
    if bias is not None or out_dtype not in (None, x.dtype):
        plain = weight.experts.unpack().transpose(1, 2)
        return functional.grouped_mm(x, plain, offs=offs, bias=bias, out_dtype=out_dtype)
    parts, start = [], 0
    for expert, stop in enumerate(offs.tolist()):
        if start < stop:
            parts.append(functional.linear(x[start:stop], weight.experts.expert(expert)))
        start = max(start, stop)
    if start < len(x):
        parts.append(x.new_zeros(len(x) - start, weight.shape[2]))
    return torch.cat(parts) if parts else x.new_zeros(0, weight.shape[2])


# Modules


def can_be_packed_experts(weight: Tensor) -> bool:
    """Whether they are frozen bfloat16 weights in a CPU's memory."""
    is_plain = type(weight) is nn.Parameter and weight.is_contiguous() and not weight.requires_grad
    return is_plain and weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and weight.numel() > 0


def pack_experts(module: nn.Module, names: Sequence[str]) -> None:
    """Hold stacked weights packed. The module's state_dict has them as they were."""
    for name in names:
        packed = PackedExperts.of(getattr(module, name))
        setattr(module, name, nn.Parameter(packed, requires_grad=False))
    vars(module)["loraplex_unpacks"] = module._register_state_dict_hook(_unpack_entries)


def unpack_experts(module: nn.Module) -> None:
    """Give a module its stacked weights back; nothing happens to one that isn't packed."""
    for name, weight in list(module.named_parameters(recurse=False)):
        if isinstance(weight, PackedExperts):
            setattr(module, name, nn.Parameter(weight.unpack(), requires_grad=False))
    handle = vars(module).pop("loraplex_unpacks", None)
    if handle is not None:
        handle.remove()


def _unpack_entries(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for name, _weight in module.named_parameters(recurse=False):
        held = state.get(f"{prefix}{name}")
        if isinstance(held, PackedExperts):
            state[f"{prefix}{name}"] = held.unpack()
