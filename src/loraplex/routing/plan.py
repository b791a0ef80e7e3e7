"""The routing plan: for each token of a packed batch, its slots and gates."""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from loraplex.adapters.store.slot_weights import SlotWeights
from loraplex.kernels.dispatch import (
    Kernel,
    choose_kernel,
    choose_training_kernel,
    compiled_product_pays,
    native_runs,
)
from loraplex.kernels.segments import LoraSegment
from loraplex.kernels.stacked import LoraStack, stack_segments
from loraplex.kernels.triton.available import triton_runs
from loraplex.kernels.triton.work import SlotFactors, WorkList, make_work, tokens_of_a_tile
from loraplex.routing.layer_gates import GateColumn, LayerGates
from loraplex.routing.weight_provider import WeightProvider


class Segment(NamedTuple):
    """The tokens [start, stop) go through `slot` with one gate, or a gate for each token."""

    start: int
    stop: int
    slot: int
    gate: float | Tensor | GateColumn = 1.0  # or [stop - start], float32; or what an expert's mixture predicts


def join_neighbours(segments: Sequence[Segment]) -> list[Segment]:
    """Let segments of one slot and gate that follow each other be one: fewer and larger matrix products."""
    joined: list[Segment] = []
    for segment in segments:
        last = joined[-1] if joined else None
        if (
            last is not None
            and (last.stop, last.slot) == (segment.start, segment.slot)
            and isinstance(last.gate, float)
            and isinstance(segment.gate, float)
            and last.gate == segment.gate
        ):
            joined[-1] = last._replace(stop=segment.stop)
        else:
            joined.append(segment)
    return joined


class RoutingPlan:
    """What one forward pass needs, shared by all its LoRA layers; reused by passes of the same layout."""

    def __init__(
        self,
        segments: Sequence[Segment],
        num_tokens: int,
        bank: WeightProvider,
        *,
        tokens_per_row: int | None = None,
        fast_decode: bool = False,
        layer_gates: LayerGates | None = None,
    ) -> None:
        segments = [segment for segment in segments if segment.start < segment.stop]
        # Served rows stay apart and the layout alone chooses the kernel: a row's bits must not depend on what its
        # neighbours use. Training has no such promise to keep.
        self.segments = join_neighbours(segments) if bank.trainable else segments
        self.num_tokens = num_tokens
        self.tokens_per_row = num_tokens if tokens_per_row is None else tokens_per_row
        self.bank = bank
        self._layer_gates = layer_gates if any(isinstance(s.gate, GateColumn) for s in self.segments) else None
        self._filled_version = 0
        self._stacks: dict[int, LoraStack] = {}
        self._adapted: set[int] = set()
        self._gained: set[int] = set()
        for slot in {segment.slot for segment in self.segments}:
            self._adapted.update(bank.layers(slot))
            self._gained.update(bank.dora_scaled(slot))
        self._native_arguments: dict[int, tuple[Tensor, Tensor, int, Tensor, Tensor]] = {}
        self._kernel: Kernel | None = None
        self._fast_decode = fast_decode and bank.native_table() is not None
        self._decodes_fast: bool | None = None
        self._launches_together: bool | None = None

    def adapts(self, module: int) -> bool:
        """Whether any row of this batch adapts the module."""
        return module in self._adapted

    @property
    def adapted(self) -> frozenset[int]:
        """The modules that any row of this batch adapts."""
        return frozenset(self._adapted)

    def has_dora_scale(self, module: int) -> bool:
        """Whether a DoRA adapter of this batch takes a share of the module's base output."""
        return module in self._gained

    @property
    def gates_need_grad(self) -> bool:
        """Whether a scaling head that predicted this pass's gates is in training."""
        values = None if self._layer_gates is None else self._layer_gates.values
        return values is not None and values.requires_grad

    def kernel(self, x: Tensor, *, needs_grad: bool) -> Kernel:
        """Which kernel runs this plan on inputs like x; decided once, since a plan meets one dtype and device."""
        if needs_grad:
            has_dropout = any(self.bank.dropout(segment.slot)[0] > 0 for segment in self.segments)
            return choose_training_kernel(x.device, x.dtype, has_dropout=has_dropout)
        if self._kernel is None:
            has_table = self.bank.native_table() is not None
            self._kernel = choose_kernel(x.device, x.dtype, self.tokens_per_row, has_table=has_table)
        return self._kernel

    def launches_together(self, x: Tensor) -> bool:
        """Whether modules that read one x share the launches of their adapters, as they can in the Triton kernels."""
        if self._launches_together is None:
            self._launches_together = bool(self._adapted) and triton_runs(x.device, x.dtype)
        return self._launches_together

    def decodes_fast(self, x: Tensor) -> bool:
        """Whether base product and adapters run in one compiled call for inputs like x; decided once."""
        if self._decodes_fast is None:
            pays = compiled_product_pays(self.num_tokens, x.shape[-1], x.dtype)
            self._decodes_fast = self._fast_decode and pays and native_runs(x.device, x.dtype)
        return self._decodes_fast and not torch.is_grad_enabled()

    def native_arguments(self, module: int) -> tuple[Tensor, Tensor, int, Tensor, Tensor]:
        """What the compiled kernel takes of this plan for one module; kept, since every decoding step asks for it."""
        if self._layer_gates is not None:
            self.gates_of(module)  # brings the kept tensor up to date
        known = self._native_arguments.get(module)
        if known is None:
            known = self._native_arguments[module] = (*self.table, module, self.rows, self.gates_of(module))
        return known

    @cached_property
    def table(self) -> tuple[Tensor, Tensor]:
        """The bank's addresses and LoRA scalings, for the compiled kernel."""
        table = self.bank.native_table()
        assert table is not None, "the compiled kernel was chosen for a bank without a table"
        return table

    @cached_property
    def factors(self) -> SlotFactors:
        """The bank's table for the Triton kernels."""
        table, scalings = self.table
        max_rank = max((self.bank.max_rank(slot) for slot in {segment.slot for segment in self.segments}), default=1)
        return SlotFactors(
            table, scalings, max_rank, table.device.type != "cpu"
        )  # torch aligns what it allocates there

    @cached_property
    def work(self) -> WorkList:
        """The segments for the Triton kernels, on the table's device."""
        return make_work(self.row_list, tokens_of_a_tile(self.tokens_per_row), self.table[0].device)

    @cached_property
    def rows(self) -> Tensor:  # [segments, 4]  int64
        """The segments for the compiled kernel."""
        return torch.tensor(self.row_list, dtype=torch.int64).view(-1, 4)

    @cached_property
    def row_list(self) -> list[list[int]]:
        """Start, stop, slot and first gate of each segment; neighbours of one slot are one, which changes no bits."""
        first = 0
        rows: list[list[int]] = []
        for segment in self.segments:
            if rows and rows[-1][1:3] == [segment.start, segment.slot]:
                rows[-1][1] = segment.stop
            else:
                rows.append([segment.start, segment.stop, segment.slot, first])
            first += segment.stop - segment.start
        return rows

    def gates_of(self, module: int) -> Tensor:  # [sum of segment lengths]  float32, without LoRA scaling
        """The module's gates, in the order of the segments; all modules share one tensor unless experts take part."""
        if self._layer_gates is None:
            return self._gate_table[0]
        if self._filled_version != self._layer_gates.version:
            self._fill_gate_table(self._layer_gates)
        return self._gate_table[module]

    def all_gates(self) -> Tensor:  # [gates] or [modules, gates]  float32
        """The gates of all modules, in the order of the segments, for a kernel that runs several modules."""
        if self._layer_gates is None:
            return self._gate_table[0]
        table = self.gates_of(0)._base
        assert table is not None, "the rows of the gate table are views of one tensor"
        return table

    @cached_property
    def _gate_table(self) -> tuple[Tensor, ...]:
        """One row of gates for each module; only one without experts. Experts' gates are filled in for each pass."""
        parts = [
            segment.gate
            if isinstance(segment.gate, Tensor)
            else torch.full((segment.stop - segment.start,), segment.gate if isinstance(segment.gate, float) else 0.0)
            for segment in self.segments
        ]
        table = self.bank.native_table()
        device = torch.device("cpu") if table is None else table[0].device
        if device.type != "cpu" and any(isinstance(segment.gate, Tensor) for segment in self.segments):
            parts = [part.to(device) for part in parts]
        gates = (torch.cat(parts).float() if parts else torch.zeros(0)).to(device)  # one copy
        num_rows = 1 if self._layer_gates is None else self.table[0].shape[1]
        return gates.repeat(num_rows, 1).unbind(0)

    def _fill_gate_table(self, layer_gates: LayerGates) -> None:
        columns, positions = self._expert_columns
        length = next(s.gate.length for s in self.segments if isinstance(s.gate, GateColumn))
        known = layer_gates.of_tokens(length)
        values = known[:, columns, :, -length:].flatten(1)  # [modules, experts' gates]
        table = self._gate_table[0]._base
        assert table is not None, "the rows of the gate table are views of one tensor"
        table[:, positions] = values.to(table.dtype)
        self._filled_version = layer_gates.version

    @cached_property
    def _expert_columns(self) -> tuple[Tensor, Tensor]:  # [expert segments], [their gates]
        """The columns of the layer gates that this plan uses, and where their gates lie in a row of the table."""
        columns, positions, first = [], [], 0
        for segment in self.segments:
            stop = first + segment.stop - segment.start
            if isinstance(segment.gate, GateColumn):
                columns.append(segment.gate.column)
                positions.append(torch.arange(first, stop))
            first = stop
        return torch.tensor(columns), torch.cat(positions)

    def gate_of(self, segment: Segment, module: int) -> float | Tensor:  # or [stop - start]
        """One segment's gate for one module, without LoRA scaling."""
        if not isinstance(segment.gate, GateColumn):
            return segment.gate
        assert self._layer_gates is not None, "an expert's segment was planned without layer gates"
        return segment.gate.of(self._layer_gates.of_module(module, segment.gate.length))

    def weights_of(self, module: int) -> list[tuple[Segment, SlotWeights]]:
        """The segments whose adapters adapt `module`, with the weights they have there."""
        pairs = ((segment, self.bank.layers(segment.slot).get(module)) for segment in self.segments)
        return [(segment, weights) for segment, weights in pairs if weights is not None]

    def lora_segments(self, module: int, *, training: bool = False) -> list[LoraSegment]:
        """The module's segments with LoRA scaling folded into their gates."""
        result = []
        for segment, weights in self.weights_of(module):
            dropout, generator = self.bank.dropout(segment.slot) if training else (0.0, None)
            result.append(
                LoraSegment(
                    segment.start,
                    segment.stop,
                    weights.lora_a,
                    weights.lora_b,
                    self.gate_of(segment, module) * weights.scaling,
                    dropout,
                    generator,
                )
            )
        return result

    def stack(self, module: int) -> LoraStack:
        """The module's active adapters stacked, kept for the following passes of the same layout."""
        known = self._stacks.get(module)
        if known is None or self._layer_gates is not None:
            self._stacks[module] = stack_segments(self.lora_segments(module), self.num_tokens, known=known)
        return self._stacks[module]
