"""The gates of a plan's segments: one number for each of their tokens, in the order of the segments.

A gate multiplies in rank space, y += B (g * (A x)), and comes without the LoRA scaling. Links give the same gates to
all modules, mixtures other ones to each.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from loraplex.routing.layer_gates import GateColumn, LayerGates
from loraplex.routing.segments import RoutedGate, Segment
from loraplex.routing.weight_provider import WeightProvider


class Gates(Protocol):
    """What kernels read of a plan's gates."""

    change: bool  # whether they are others in each pass of the plan

    @property
    def need_grad(self) -> bool:
        """Whether a scaling head that predicted this pass's gates is in training."""
        ...

    def all(self) -> Tensor:  # [gates] or [modules, gates]  float32
        """Those of all modules, for a kernel that runs several of them."""
        ...

    def of_module(self, module: int) -> Tensor:  # [gates]  float32
        """Those of one module; all share one tensor unless experts take part."""
        ...

    def of_segment(self, segment: Segment, module: int) -> float | Tensor:  # or [stop - start]
        """Those of one segment in one module."""
        ...


def gates_of_segments(segments: Sequence[Segment], bank: WeightProvider, layer_gates: LayerGates | None) -> Gates:
    """The gates that the segments say themselves, or that a mixture sets in `layer_gates` before each pass."""
    if layer_gates is not None and any(isinstance(segment.gate, GateColumn) for segment in segments):
        return PredictedGates(segments, bank, layer_gates)
    return FixedGates(segments, bank)


def gate_row(segments: Sequence[Segment], bank: WeightProvider) -> Tensor:  # [gates]  float32
    """The gates that segments say themselves, on the device of the weights; 0 for experts, 1 for routed ones."""
    parts = [
        segment.gate
        if isinstance(segment.gate, Tensor)
        else torch.full((segment.stop - segment.start,), _number(segment))
        for segment in segments
    ]
    table = bank.native_table()
    device = torch.device("cpu") if table is None else table[0].device
    if device.type != "cpu" and any(isinstance(segment.gate, Tensor) for segment in segments):
        parts = [part.to(device) for part in parts]
    return (torch.cat(parts).float() if parts else torch.zeros(0)).to(device)  # one copy


def _own_gate(segment: Segment) -> float | Tensor:
    assert isinstance(segment.gate, float | int | Tensor), "an expert's segment was planned without what predicts gates"
    return segment.gate


def _number(segment: Segment) -> float:
    if isinstance(segment.gate, RoutedGate):
        return 1.0
    return segment.gate if isinstance(segment.gate, float) else 0.0


class FixedGates:
    """Of links: the same in every module and pass."""

    change = False
    need_grad = False

    def __init__(self, segments: Sequence[Segment], bank: WeightProvider) -> None:
        self._segments, self._bank = segments, bank

    @cached_property
    def _row(self) -> Tensor:  # [gates]
        return gate_row(self._segments, self._bank)

    def all(self) -> Tensor:
        return self._row

    def of_module(self, module: int) -> Tensor:
        return self._row

    def of_segment(self, segment: Segment, module: int) -> float | Tensor:
        return _own_gate(segment)


class PredictedGates:
    """Of links and experts: a row for each module, filled from the layer gates of the pass that runs."""

    change = True

    def __init__(self, segments: Sequence[Segment], bank: WeightProvider, layer_gates: LayerGates) -> None:
        self._segments, self._bank, self._layer_gates = segments, bank, layer_gates
        self._filled_version = 0

    @property
    def need_grad(self) -> bool:
        values = self._layer_gates.values
        return values is not None and values.requires_grad

    def all(self) -> Tensor:
        self._fill()
        return self._table

    def of_module(self, module: int) -> Tensor:
        self._fill()
        return self._rows[module]

    def of_segment(self, segment: Segment, module: int) -> float | Tensor:
        if not isinstance(segment.gate, GateColumn):
            return _own_gate(segment)
        return segment.gate.of(self._layer_gates.of_module(module, segment.gate.length))

    @cached_property
    def _table(self) -> Tensor:  # [modules, gates]
        table = self._bank.native_table()
        assert table is not None, "the compiled kernel was chosen for a bank without a table"
        return gate_row(self._segments, self._bank).repeat(table[0].shape[1], 1)

    @cached_property
    def _rows(self) -> tuple[Tensor, ...]:
        return self._table.unbind(0)

    def _fill(self) -> None:
        if self._filled_version == self._layer_gates.version:
            return
        columns, positions = self._expert_columns
        length = next(s.gate.length for s in self._segments if isinstance(s.gate, GateColumn))
        known = self._layer_gates.of_tokens(length)
        values = known[:, columns, :, -length:].flatten(1)  # [modules, experts' gates]
        self._table[:, positions] = values.to(self._table.dtype)
        self._filled_version = self._layer_gates.version

    @cached_property
    def _expert_columns(self) -> tuple[Tensor, Tensor]:  # [expert segments], [their gates]
        """The columns of the layer gates that are used, and where their gates lie in a row of the table."""
        columns, positions, first = [], [], 0
        for segment in self._segments:
            stop = first + segment.stop - segment.start
            if isinstance(segment.gate, GateColumn):
                columns.append(segment.gate.column)
                positions.append(torch.arange(first, stop))
            first = stop
        return torch.tensor(columns), torch.cat(positions)


class TableGates:
    """A table that was made for one pass; an expert's segment says by its column where its gates lie in a row."""

    change = False
    need_grad = False

    def __init__(self, table: Tensor) -> None:  # [1 or modules, gates]  float32
        self._table = table
        self._rows = table.unbind(0)

    def all(self) -> Tensor:
        return self._table

    def of_module(self, module: int) -> Tensor:
        return self._rows[module if len(self._rows) > 1 else 0]

    def of_segment(self, segment: Segment, module: int) -> float | Tensor:
        if not isinstance(segment.gate, GateColumn):
            return _own_gate(segment)
        return self.of_module(module)[segment.gate.column : segment.gate.column + segment.gate.length]
