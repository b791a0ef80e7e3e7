"""Gates that a LoRA layer predicts from its own input: experts of mixtures that need no second pass."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from loraplex.adapters.store.slot_weights import SlotWeights
from loraplex.routing.gate_record import GateRecord
from loraplex.routing.gates import Gates
from loraplex.routing.segments import RoutedGate, Segment
from loraplex.routing.weight_provider import WeightProvider


class NativeRouter(NamedTuple):
    """A router as the kernels take it (kernels/csrc/router.h, kernels/triton/route.py)."""

    kind: int
    top_k: int  # 0: all experts
    temperature: float
    top_p: float  # 0: all experts
    addresses: Tensor  # [experts, modules]  int64: of float32 parameters; 0: the expert doesn't adapt the module
    kept: object  # what is there


class TokenRouter(Protocol):
    """What predicts the gates of a mixture's experts."""

    def native(self, experts: Sequence[Mapping[int, SlotWeights]], num_modules: int) -> NativeRouter | None:
        """The router for experts with these weights by module; None where the kernels can't run it."""
        ...

    def gates(self, module: int, x: Tensor, experts: Sequence[SlotWeights | None]) -> Tensor:
        """The gates [tokens, experts], float32, for a module's input x [tokens, in]; None: doesn't adapt the module."""
        ...


class RoutedRow(NamedTuple):
    """A segment of an expert, as a row of the plan's list."""

    row: int
    start: int
    stop: int
    slot: int
    gate: RoutedGate


def native_routing(
    rows: Sequence[RoutedRow], bank: WeightProvider, record: GateRecord | None = None
) -> tuple[Tensor, ...]:
    """The experts' rows as the kernels take them (arguments.h); none where they can't run a router."""
    table = bank.native_table()
    if table is None or not rows:
        return ()
    groups: dict[tuple[TokenRouter, float, int, int], list[RoutedRow]] = {}
    for row in rows:
        groups.setdefault((row.gate.router, row.gate.weight, row.start, row.stop), []).append(row)
    places, settings, parameters, columns = [], [], [], []
    for number, members in enumerate(groups.values()):
        members.sort(key=lambda row: row.gate.expert)
        found = members[0].gate.router.native([bank.layers(row.slot) for row in members], table[0].shape[1])
        if found is None or len(found.addresses) != len(members):
            return ()
        places += [(row.row, number, found.kind, found.top_k) for row in members]
        settings += [(found.temperature, found.top_p, row.gate.weight) for row in members]
        parameters.append(found.addresses)
        columns += [(-1, 1) if record is None else record.column(row.gate, row.start) for row in members]
    kept = () if record is None else (torch.tensor(columns), record.values)
    return torch.tensor(places), torch.tensor(settings, dtype=torch.float32), torch.cat(parameters), *kept


class _Place(NamedTuple):
    """The tokens of a segment, and the first of its gates in a row of the table."""

    start: int
    stop: int
    slot: int
    first: int
    gate: RoutedGate

    @property
    def num_tokens(self) -> int:
        return self.stop - self.start


class RoutedGates:
    """The gates of a plan of which some are predicted by its layers: `prepare` comes before a module's are read."""

    change = True

    def __init__(
        self, others: Gates, segments: Sequence[Segment], bank: WeightProvider, record: GateRecord | None = None
    ) -> None:
        """`others` has the gates of the segments that no router predicts; `record` keeps those that are wanted."""
        self._others, self._bank, self._record = others, bank, record
        self._places: dict[TokenRouter, dict[int, list[_Place]]] = {}  # by expert
        self._firsts: dict[tuple[int, RoutedGate], int] = {}  # by first token and gate
        self._num_gates = 0
        for segment in segments:
            gate = segment.gate
            if isinstance(gate, RoutedGate):
                place = _Place(segment.start, segment.stop, segment.slot, self._num_gates, gate)
                self._places.setdefault(gate.router, {}).setdefault(gate.expert, []).append(place)
                self._firsts[segment.start, gate] = self._num_gates
            self._num_gates += segment.stop - segment.start
        for experts in self._places.values():
            for places in experts.values():
                places.sort()
        self._rows: dict[int, Tensor] = {}

    @property
    def need_grad(self) -> bool:
        return self._others.need_grad

    def prepare(self, module: int, x: Tensor) -> None:  # [tokens, in]
        """Predict the module's gates for its input."""
        row = self._row(module)
        row.copy_(self._others.of_module(module))
        for router, by_expert in self._places.items():
            first = next(iter(by_expert.values()))
            tokens = _of_tokens(x, first)
            weights = [self._bank.layers(by_expert[e][0].slot).get(module) for e in sorted(by_expert)]
            if any(found is not None for found in weights):
                gates = router.gates(module, tokens, weights)
                for column, expert in enumerate(sorted(by_expert)):
                    self._put(module, row, gates[:, column], by_expert[expert])

    def _put(self, module: int, row: Tensor, gates: Tensor, places: Sequence[_Place]) -> None:
        offset = 0
        for place in places:
            own = gates[offset : offset + place.num_tokens]
            row[place.first : place.first + place.num_tokens] = own * place.gate.weight
            if self._record is not None:
                self._record.put(module, place.gate, place.start, own)
            offset += place.num_tokens

    def all(self) -> Tensor:
        """Those that no router predicts, and 1 for the others, which kernels multiply that route in their call."""
        return self._others.all()

    def unrouted(self, module: int) -> Tensor:
        """The same for one module."""
        return self._others.of_module(module)

    def of_module(self, module: int) -> Tensor:
        return self._row(module)

    def of_segment(self, segment: Segment, module: int) -> float | Tensor:
        if not isinstance(segment.gate, RoutedGate):
            return self._others.of_segment(segment, module)
        first = self._firsts[segment.start, segment.gate]
        return self._row(module)[first : first + segment.stop - segment.start]

    def _row(self, module: int) -> Tensor:
        if module not in self._rows:
            self._rows[module] = torch.zeros(self._num_gates, device=self._others.of_module(module).device)
        return self._rows[module]


def _of_tokens(x: Tensor, places: Sequence[_Place]) -> Tensor:  # [tokens of the places, in]
    if len(places) == 1:
        return x[places[0].start : places[0].stop]
    return torch.cat([x[place.start : place.stop] for place in places])
