"""A bfloat16 weight whose values are held once, in the order in which the compiled product reads them.

A linear product runs on it as it lies, with gradients for its input; whatever else reads it sees the weight that it
was, unpacked for this use, and what writes to it (`copy_`, `load_state_dict`) packs it anew. What writes to a part of
it (a view) changes the unpacked one only.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_map_only

from loraplex.large_memory import LargeMemory

_TILES = 2  # AMX, of the ways in tiles.h
_TILE_OUT, _TILE_IN = 16, 32  # values of W in a tile
TILE_TOKENS = 16  # in a tile of x

# What the compiled products take of adapters: table, scalings, module, segments, gates, routing (see native.py).
Adapters = tuple[Tensor, Tensor, int, Tensor, Tensor, Sequence[Tensor]]


def packed_size(out: int, in_: int) -> int:
    """How many values a packed weight [out, in] has: whole tiles."""
    return -(-out // _TILE_OUT) * _TILE_OUT * (-(-in_ // _TILE_IN) * _TILE_IN)


class PackedWeight(Tensor):
    """A frozen weight [out, in] as `pack_weight` lays it out (kernels/csrc/tiles.h)."""

    packed: Tensor  # [..]  bfloat16

    @staticmethod
    def __new__(cls, packed: Tensor, out: int, in_: int) -> "PackedWeight":
        make: Any = Tensor._make_wrapper_subclass
        made: PackedWeight = make(cls, (out, in_), dtype=packed.dtype, device=packed.device)
        made.packed = packed
        return made

    @classmethod
    def of(cls, weight: Tensor) -> "PackedWeight":
        """Pack a contiguous bfloat16 weight [out, in] in a CPU's memory."""
        return cls(torch.ops.loraplex.pack_weight(weight.detach()), *weight.shape)

    def alias(self) -> "PackedWeight":
        """Another tensor with the same values in the same memory."""
        return PackedWeight(self.packed, *self.shape)

    def write(self, weight: Tensor) -> None:
        """Take over other values [out, in]."""
        self.packed.copy_(torch.ops.loraplex.pack_weight(weight))

    def product(self, x: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        """What `packed_linear` gives; `rest` are the adapters, float_sums and the way of computing."""
        return _operator()(x, self.packed, *self.shape, bias, *rest)

    def unpack(self) -> Tensor:  # [out, in]
        """The weight as it was, to the bit."""
        weight: Tensor = torch.ops.loraplex.unpack_weight(self.packed, *self.shape)
        return weight

    def data_ptr(self) -> int:
        return self.packed.data_ptr()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"PackedWeight({tuple(self.shape)})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return nn.Parameter(self.unpack(), requires_grad=False)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is functional.linear:
            return _linear(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():  # results are plain tensors
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return args[0].alias()
        written = [args[i] for i, argument in enumerate(func._schema.arguments[: len(args)]) if _is_written(argument)]
        plain: dict[int, Tensor] = {}

        def unpacked(weight: PackedWeight) -> Tensor:
            return plain.setdefault(id(weight), weight.unpack())

        own_args, own_kwargs = tree_map_only(PackedWeight, unpacked, (tuple(args), dict(kwargs or {})))
        result = func(*own_args, **own_kwargs)
        for weight in written:
            if isinstance(weight, PackedWeight):
                weight.write(plain[id(weight)])
                result = weight
        return result


def _is_written(argument: Any) -> bool:
    """Whether an operator writes to this argument."""
    return argument.alias_info is not None and argument.alias_info.is_write


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not isinstance(weight, PackedWeight) or input.dtype != weight.dtype:  # torch says what is wrong with it
        weight = weight.unpack() if isinstance(weight, PackedWeight) else weight
        input = input.unpack() if isinstance(input, PackedWeight) else input
        return functional.linear(input, weight, bias)
    if torch.is_grad_enabled() and input.requires_grad:
        return _Product.apply(input, weight, bias)
    return packed_linear(input, weight, bias)


class _Product(torch.autograd.Function):
    """The graph keeps no unpacked weight: the way back unpacks it once more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return packed_linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad @ ctx.weight.unpack(), None, None


def packed_linear(
    x: Tensor,  # [.., in]
    weight: PackedWeight,  # [out, in]
    bias: Tensor | None,  # [out]
    adapters: "Adapters | None" = None,
    *,
    float_sums: bool = False,
    tiling: int = -1,  # one of tiles.h; -1: the fastest that this machine has
) -> Tensor:  # [.., out]  of x's dtype, or float32 with `float_sums`
    """W x[t] + bias, and the adapters' part (see gated_linear_native); a token has the same bits in any batch."""
    rest = no_adapters() if adapters is None else adapters
    return weight.product(x.contiguous(), bias, *rest, float_sums, tiling)


@cache
def _operator() -> Callable[..., Tensor]:
    return torch.ops.loraplex.gated_packed_linear.default


@cache
def no_adapters() -> Adapters:
    """The kernel's arguments for no adapter."""
    empty = torch.zeros(0, 4, dtype=torch.int64)
    return torch.zeros(1, 1, 3, dtype=torch.int64), torch.zeros(1, 1), 0, empty, torch.zeros(0), ()


# Modules


@cache
def has_fast_packed_product() -> bool:
    """Whether this machine multiplies packed weights by tiles."""
    return bool(torch.ops.loraplex.tiling() == _TILES)


def can_be_packed(module: nn.Linear) -> bool:
    """Whether it is a frozen bfloat16 weight in a CPU's memory."""
    weight = module.weight
    is_plain = type(weight) is nn.Parameter and weight.is_contiguous() and not weight.requires_grad
    return is_plain and weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and weight.numel() > 0


def pack(module: nn.Linear, memory: LargeMemory) -> None:
    """Hold a module's weight packed. Its state_dict has the weight as it was."""
    hold(module, PackedWeight.of(module.weight), memory)


def hold(module: nn.Linear, weight: PackedWeight, memory: LargeMemory) -> None:
    """Let a module have this weight, in this memory. Its state_dict has the weight unpacked."""
    weight.packed = memory.keep(weight.packed)
    module.weight = nn.Parameter(weight, requires_grad=False)
    vars(module)["loraplex_unpacks"] = module._register_state_dict_hook(_unpack_entry)


def unpack(module: nn.Linear) -> None:
    """Give a packed module its weight back; nothing happens to another one."""
    if isinstance(module.weight, PackedWeight):
        module.weight = nn.Parameter(module.weight.unpack(), requires_grad=False)
    handle = vars(module).pop("loraplex_unpacks", None)
    if handle is not None:
        handle.remove()


def _unpack_entry(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    weight = state.get(f"{prefix}weight")
    if isinstance(weight, PackedWeight):
        state[f"{prefix}weight"] = weight.unpack()
