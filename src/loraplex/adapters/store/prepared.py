"""An adapter in the form that slots take, and that form in one buffer."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from loraplex.adapters.store.module_change import ModuleChange
from loraplex.adapters.store.slot_weights import SlotWeights


class PackedLayers(Mapping[int, SlotWeights]):
    """The slot weights of modules, by index, whose tensors are made when they are asked for.

    Making several hundred tensors takes longer than reading what is in them, and with a thousand adapters Python's
    garbage collector would have a quarter of a million more to visit. The compiled kernels only need addresses.
    """

    def __init__(
        self,
        buffer: Tensor,  # [bytes] uint8
        dtype: torch.dtype,  # of the factors; a gain is float32
        modules: Sequence[int],
        places: Tensor,  # [modules, 6] int64: first bytes of lora_a, lora_b and gain (-1: none), rows, inputs, outputs
        scalings: Sequence[float],  # [modules]
        num_experts: Sequence[int] | None = None,  # [modules], stacked in each; None: one
    ) -> None:
        self.buffer = buffer
        self.dtype = dtype
        self._modules = tuple(modules)
        self._places = places
        self._scalings = tuple(scalings)
        self._num_experts = tuple(num_experts or (1,) * len(self._modules))
        self._rows = {module: row for row, module in enumerate(self._modules)}
        self._made: dict[int, SlotWeights] = {}

    def __getitem__(self, module: int) -> SlotWeights:
        made = self._made.get(module)
        if made is None:
            made = self._made[module] = self._make(self._rows[module])
        return made

    def __iter__(self) -> Iterator[int]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    def __contains__(self, module: object) -> bool:
        return module in self._rows

    def on(self, buffer: Tensor) -> "PackedLayers":
        """The same in a copy of the buffer."""
        return PackedLayers(buffer, self.dtype, self._modules, self._places, self._scalings, self._num_experts)

    @property
    def num_bytes(self) -> int:
        """Of the weights, without what lies between them."""
        _, _, dora_scale, rank, num_in, num_out = self._places.unbind(1)
        dora_scales = torch.where(dora_scale < 0, 0, num_out) * torch.float32.itemsize
        return int((rank * (num_in + num_out) * self.dtype.itemsize + dora_scales).sum())

    @property
    def max_rank(self) -> int:
        return int(self._ranks.max()) if len(self) else 0

    @property
    def _ranks(self) -> Tensor:  # [modules]
        return self._places[:, 3] // torch.tensor(self._num_experts, dtype=torch.int64)

    @property
    def dora_scaled(self) -> frozenset[int]:
        """The modules where DoRA takes a share of the base output."""
        has_dora_scale = (self._places[:, 2] >= 0).tolist()
        return frozenset(module for module, has in zip(self._modules, has_dora_scale, strict=True) if has)

    def addresses(self) -> tuple[Tensor, Tensor, Tensor]:  # [modules], [modules, 3], [modules]
        """The modules, and what a table of slots has for each: addresses and rank, and the LoRA scaling."""
        rows = torch.cat((self._places[:, :2] + self.buffer.data_ptr(), self._ranks.unsqueeze(1)), dim=1)
        return torch.tensor(self._modules, dtype=torch.int64), rows, torch.tensor(self._scalings, dtype=torch.float32)

    def _make(self, row: int) -> SlotWeights:
        first_a, first_b, first_gain, rows, num_in, num_out = self._places[row].tolist()

        def factor(first: int, width: int) -> Tensor:
            return self.buffer[first : first + rows * width * self.dtype.itemsize].view(self.dtype).view(rows, width)

        dora_scale = None
        if first_gain >= 0:
            stop = first_gain + num_out * torch.float32.itemsize
            dora_scale = self.buffer[first_gain:stop].view(torch.float32)
        return SlotWeights(
            lora_a=factor(first_a, num_in),
            lora_b=factor(first_b, num_out),
            scaling=self._scalings[row],
            dora_scale=dora_scale,
            num_experts=self._num_experts[row],
        )


@dataclass(frozen=True, kw_only=True)
class PreparedAdapter:
    """An adapter ready for a slot, by module index of the base model."""

    layers: Mapping[int, SlotWeights]
    invocation: tuple[int, ...] | None = None  # aLoRA: the tokens from which on it is active
    read_back: "Callable[[], PreparedAdapter] | None" = None  # reads it again, from a file that is as it was
    changes: Mapping[str, ModuleChange] = field(default_factory=dict)  # by path, to modules' own weights

    @property
    def num_tokens(self) -> int | None:
        """How many tokens embedding and output layer have with it; None: as many as the base's."""
        return next((change.size for change in self.changes.values() if change.size is not None), None)

    def to(self, device: torch.device) -> "PreparedAdapter":
        layers = {index: weights.to(device) for index, weights in self.layers.items()}
        return PreparedAdapter(layers=layers, invocation=self.invocation, changes=self.changes).changes_to(device)

    def changes_to(self, device: torch.device) -> "PreparedAdapter":
        """The same with the changes on a device, and the factors where they are."""
        if not self.changes:
            return self
        return replace(self, changes={path: change.to(device) for path, change in self.changes.items()})

    @property
    def packed(self) -> PackedLayers | None:
        """Its layers, if all their tensors are in one buffer."""
        return self.layers if isinstance(self.layers, PackedLayers) else None

    @cached_property
    def dora_scaled(self) -> frozenset[int]:
        """The modules where DoRA takes a share of the base output."""
        if self.packed is not None:
            return self.packed.dora_scaled
        return frozenset(index for index, weights in self.layers.items() if weights.dora_scale is not None)

    @cached_property
    def max_rank(self) -> int:
        if self.packed is not None:
            return self.packed.max_rank
        return max((weights.rank for weights in self.layers.values()), default=0)

    @cached_property
    def num_bytes(self) -> int:
        others = sum(change.num_bytes for change in self.changes.values())
        if self.packed is not None:
            return self.packed.num_bytes + others
        return sum(weights.num_bytes for weights in self.layers.values()) + others

    @cached_property
    def addresses(self) -> tuple[Tensor, Tensor, Tensor]:  # [modules], [modules, 3], [modules]
        """The modules, and what the table has for each: addresses and rank, and the LoRA scaling.

        Of stacked experts, the addresses of the first.
        """
        if self.packed is not None:
            return self.packed.addresses()
        rows = [(w.lora_a.data_ptr(), w.lora_b.data_ptr(), w.rank) for w in self.layers.values()]
        scalings = [w.scaling for w in self.layers.values()]
        indices = torch.tensor(list(self.layers), dtype=torch.int64)
        return indices, torch.tensor(rows, dtype=torch.int64).view(-1, 3), torch.tensor(scalings, dtype=torch.float32)
