"""A weight held as 8-bit integers with scales, for products with bfloat16 tokens on a CPU.

The integers are what a linear product reads (kernels/csrc/int8_tiles.h); whatever else reads the weight sees their
values, dequantized and rounded to bfloat16 for this use, and what writes to it quantizes anew. A state dict has these
values too: they are the quantized model's, not the original's.
"""

from typing import Any

import torch
from torch import Tensor, nn

from loraplex.kernels.packed_weight import PackedWeight, hold
from loraplex.large_memory import LargeMemory

COLUMN = 0  # a group: all inputs of an output share a scale
GROUP = 128  # inputs of an output that share one, where a column's would be too coarse

_MAX_COLUMN = 2**16  # inputs that can share a scale: their sums have 32 bits
_LARGEST = 127
_ROUNDING = 0.75  # of a scale: to the nearest integer, and the scale and the value to 16 bits
_LEAST_SCALE = 1e-12
_PART_VALUES = 2**22  # that are float32 at once: the whole weight never is


class Int8Weight(PackedWeight):
    """A frozen weight [out, in]: integers times the scale of their group (kernels/csrc/int8_layout.h)."""

    group: int

    @staticmethod
    def __new__(cls, packed: Tensor, out: int, in_: int, group: int = COLUMN) -> "Int8Weight":
        make: Any = Tensor._make_wrapper_subclass
        made: Int8Weight = make(cls, (out, in_), dtype=torch.bfloat16, device=packed.device)
        made.packed, made.group = packed, group
        return made

    @classmethod
    def of(cls, weight: Tensor, group: int = COLUMN) -> "Int8Weight":
        """Quantize a weight [out, in] in a CPU's memory."""
        if group == COLUMN and weight.shape[1] > _MAX_COLUMN:
            group = GROUP
        return cls.from_values(*quantize(weight.detach(), group), group)

    @classmethod
    def from_values(
        cls,
        values: Tensor,  # [out, in]  int8
        scales: Tensor,  # [out, groups]  float32; of float16 values unless the group is COLUMN
        group: int,
    ) -> "Int8Weight":
        """Hold integers and scales as they are."""
        packed = torch.ops.loraplex.pack_int8(values.contiguous(), scales.contiguous(), group)
        return _held(packed, values.shape, group)

    def values_and_scales(self) -> tuple[Tensor, Tensor]:  # [out, in] int8, [out, groups] float32
        """The integers and scales as they are."""
        values, scales = torch.ops.loraplex.unpack_int8(self.packed, *self.shape, self.group)
        return values, scales

    def unpack(self) -> Tensor:  # [out, in]
        """The values in bfloat16."""
        return self.to_values(torch.bfloat16)

    def to_values(self, dtype: torch.dtype) -> Tensor:  # [out, in]
        """The values, rounded once to `dtype`."""
        values, scales = self.values_and_scales()
        made = torch.empty(self.shape, dtype=dtype)
        wide = torch.promote_types(dtype, torch.float32)
        for rows in _parts(self.shape):
            made[rows] = values[rows].to(wide) * self._of_values(scales[rows]).to(wide)
        return made

    def is_made_of(self, weight: Tensor) -> bool:
        """Whether a weight [out, in] may be what was quantized: each value lies within a rounding of ours."""
        values, scales = self.values_and_scales()
        return all(
            bool(((values[rows] - weight[rows].float() / factors).abs() <= _ROUNDING).all())
            for rows in _parts(self.shape)
            for factors in (self._of_values(scales[rows]).clamp_min(_LEAST_SCALE),)
        )

    def _of_values(self, scales: Tensor) -> Tensor:  # [rows, groups] -> [rows, in or 1]
        if self.group == COLUMN:
            return scales
        return scales.repeat_interleave(self.group, dim=1)[:, : self.shape[1]]

    def alias(self) -> "Int8Weight":
        return _held(self.packed, self.shape, self.group)

    def write(self, weight: Tensor) -> None:
        self.packed.copy_(Int8Weight.of(weight, self.group).packed)

    def product(self, x: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        return _operator(x, self.packed, *self.shape, self.group, bias, *rest)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Int8Weight({tuple(self.shape)}, group={self.group})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return nn.Parameter(_held(self.packed.clone(), self.shape, self.group), requires_grad=False)


def _held(packed: Tensor, shape: torch.Size, group: int) -> Int8Weight:
    make: Any = Int8Weight
    made: Int8Weight = make(packed, *shape, group)
    return made


def _operator(*arguments: Any) -> Tensor:
    made: Tensor = torch.ops.loraplex.gated_int8_linear.default(*arguments)
    return made


def quantize(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:  # [out, in] int8, [out, groups] float32
    """The nearest integers; the largest value of a group becomes 127 or -127."""
    num_groups = 1 if group == COLUMN else -(-weight.shape[1] // group)
    values = torch.empty(weight.shape, dtype=torch.int8)
    scales = torch.empty(len(weight), num_groups)
    for rows in _parts(weight.shape):
        values[rows], scales[rows] = _quantize_part(weight[rows].float(), group, num_groups)
    return values, scales


def _quantize_part(weight: Tensor, group: int, num_groups: int) -> tuple[Tensor, Tensor]:
    rows, width = weight.shape
    size = width if group == COLUMN else group
    grouped = nn.functional.pad(weight, (0, num_groups * size - width)).view(rows, num_groups, size)
    scales = grouped.abs().amax(dim=-1) / _LARGEST
    if group != COLUMN:
        scales = scales.half().float()  # as it is held
    divisors = scales.where(scales > 0, 1.0).unsqueeze(-1)
    integers = (grouped / divisors).round_().clamp_(-_LARGEST, _LARGEST)
    return integers.view(rows, -1)[:, :width].to(torch.int8), scales


def _parts(shape: torch.Size) -> list[slice]:
    """Rows of a weight, so few at once that they may be float32."""
    count = max(1, _PART_VALUES // shape[1])
    return [slice(first, first + count) for first in range(0, shape[0], count)]


def can_be_int8(module: nn.Module) -> bool:
    """Whether it is a plain linear module, in a CPU's memory or not filled yet."""
    if type(module) is not nn.Linear or "forward" in vars(module):
        return False
    weight = module.weight
    is_plain = type(weight) is nn.Parameter and weight.is_contiguous() and weight.numel() > 0
    return is_plain and weight.device.type in ("cpu", "meta")


def hold_int8(module: nn.Linear, memory: LargeMemory, group: int = COLUMN) -> None:
    """Quantize a module's weight, and hold it so."""
    hold(module, Int8Weight.of(module.weight, group), memory)


def is_int8(module: nn.Module) -> bool:
    """Whether a module holds an Int8Weight."""
    return isinstance(getattr(module, "weight", None), Int8Weight)
