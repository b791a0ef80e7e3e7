"""The routing plan: for each token of a packed batch, its slots and gates."""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from loraplex.adapters.store.module_change import ModuleChange
from loraplex.adapters.store.slot_weights import SlotWeights
from loraplex.kernels.dispatch import (
    Kernel,
    choose_kernel,
    choose_training_kernel,
    native_runs,
)
from loraplex.kernels.packed_weight import Adapters
from loraplex.kernels.segments import LoraSegment
from loraplex.kernels.stacked import LoraStack, stack_segments
from loraplex.kernels.triton.available import triton_runs
from loraplex.kernels.triton.work import (
    RouteWork,
    SlotFactors,
    WorkList,
    make_route_work,
    make_work,
    tokens_of_a_tile,
)
from loraplex.routing.gate_record import GateRecord, make_gate_record
from loraplex.routing.gates import Gates, gates_of_segments
from loraplex.routing.layer_gates import LayerGates
from loraplex.routing.segments import RoutedGate, Segment, join_for_training
from loraplex.routing.token_groups import TokenGroups, group_tokens
from loraplex.routing.token_router import RoutedGates, RoutedRow, native_routing
from loraplex.routing.weight_provider import WeightProvider


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
        batch_invariant: bool = False,
        layer_gates: LayerGates | None = None,
        gates: Gates | None = None,
    ) -> None:
        """Where segments take what a mixture predicts, `layer_gates` has it for each pass, or `gates` for this one."""
        segments = [segment for segment in segments if segment.start < segment.stop]
        # Served rows stay apart and the layout alone chooses the kernel: a row's bits must not depend on what its
        # neighbours use. Training has no such promise to keep.
        self.segments = join_for_training(segments, _device(segments, bank)) if bank.trainable else segments
        self.num_tokens = num_tokens
        self.tokens_per_row = num_tokens if tokens_per_row is None else tokens_per_row
        self.bank = bank
        self.gates: Gates = gates or gates_of_segments(self.segments, bank, layer_gates)
        self._routed: RoutedGates | None = None
        self.gate_record: GateRecord | None = None  # what routers predict for rows that want to know it
        if any(isinstance(segment.gate, RoutedGate) for segment in self.segments):
            self.gate_record = make_gate_record(self.segments, bank)
            self.gates = self._routed = RoutedGates(self.gates, self.segments, bank, self.gate_record)
        self._stacks: dict[int, LoraStack] = {}
        self._groups: dict[frozenset[int], TokenGroups] = {}
        self._adapted: set[int] = set()
        self._gained: set[int] = set()
        self._changed: set[str] = set()
        for slot in {segment.slot for segment in self.segments}:
            self._adapted.update(bank.layers(slot))
            self._gained.update(bank.dora_scaled(slot))
            self._changed.update(bank.changes(slot))
        self._native_arguments: dict[int, Adapters] = {}
        self._kernel: Kernel | None = None
        self._fast_decode = fast_decode and bank.native_table() is not None
        self._batch_invariant = batch_invariant
        self._native_runs: bool | None = None
        self._launches_together: bool | None = None

    @property
    def is_routed(self) -> bool:
        """Whether gates are predicted from the modules' inputs: `route` then comes before a module's adapters."""
        return self._routed is not None

    def route(self, module: int, x: Tensor) -> None:  # [.., in]
        """Predict the gates of one module for its input; for kernels that don't do it themselves (`routes_in_call`)."""
        if self._routed is not None:
            self._routed.prepare(module, x.reshape(-1, x.shape[-1]))

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
    def has_dora_scales(self) -> bool:
        """Whether a DoRA adapter of this batch takes a share of any module's base output."""
        return bool(self._gained)

    def changes(self, path: str) -> bool:
        """Whether an adapter of this batch changes the own weights of the module at `path`."""
        return path in self._changed

    @property
    def has_changes(self) -> bool:
        """Whether an adapter of this batch changes any module's own weights."""
        return bool(self._changed)

    def changes_of(self, path: str) -> list[tuple[Segment, ModuleChange]]:
        """The segments whose adapters change the module, with what they change."""
        pairs = ((segment, self.bank.changes(segment.slot).get(path)) for segment in self.segments)
        return [(segment, change) for segment, change in pairs if change is not None]

    def kernel(self, x: Tensor, *, needs_grad: bool) -> Kernel:
        """Which kernel runs this plan on inputs like x; decided once, since a plan meets one dtype and device."""
        if needs_grad:
            has_dropout = any(self.bank.dropout(segment.slot)[0] > 0 for segment in self.segments)
            return choose_training_kernel(x.device, x.dtype, has_dropout=has_dropout)
        if self._kernel is None:
            has_table = self.bank.native_table() is not None and self.routes_in_call
            self._kernel = choose_kernel(x.device, x.dtype, self.tokens_per_row, has_table=has_table)
        return self._kernel

    def launches_together(self, x: Tensor) -> bool:
        """Whether modules that read one x share the launches of their adapters, as they can in the Triton kernels."""
        if self._launches_together is None:
            self._launches_together = bool(self._adapted) and self.routes_in_call and triton_runs(x.device, x.dtype)
        return self._launches_together

    def decodes_fast(self, x: Tensor, max_tokens: int) -> bool:
        """Whether base product and adapters run in one compiled call for inputs like x.

        It is the fastest for a module's weight up to `max_tokens`. A plan that is to be batch-invariant runs it for any
        number of tokens: another product has other bits.
        """
        if self._native_runs is None:
            self._native_runs = self._fast_decode and self.routes_in_call and native_runs(x.device, x.dtype)
        fits = self._batch_invariant or self.num_tokens <= max_tokens
        return self._native_runs and fits and not torch.is_grad_enabled()

    def native_arguments(self, module: int) -> Adapters:
        """What the compiled kernel takes of this plan for one module; kept, since every decoding step asks for it."""
        # Which also brings the kept tensor up to date.
        gates = self.gates.of_module(module) if self._routed is None else self._routed.unrouted(module)
        known = self._native_arguments.get(module)
        if known is None:
            known = self._native_arguments[module] = (*self.table, module, self.rows, gates, self.routing)
        return known

    @cached_property
    def routing(self) -> tuple[Tensor, ...]:
        """What the kernels take of the routers; empty without one, or where they can't run one."""
        return () if self._routed is None else native_routing(self._rows_and_experts[1], self.bank, self.gate_record)

    @property
    def routes_in_call(self) -> bool:
        """Whether the kernels for frozen adapters run the plan's routers, if there are any."""
        return self._routed is None or bool(self.routing)

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
    def routes(self) -> RouteWork | None:
        """The routers for the Triton kernels, on the table's device; None without one."""
        if not self.routing:
            return None
        return make_route_work(self.routing, self.row_list, tokens_of_a_tile(self.tokens_per_row), self.table[0].device)

    @cached_property
    def rows(self) -> Tensor:  # [segments, 4]  int64
        """The segments for the compiled kernel."""
        return torch.tensor(self.row_list, dtype=torch.int64).view(-1, 4)

    @cached_property
    def row_list(self) -> list[list[int]]:
        """Start, stop, slot and first gate of each segment; neighbours of one slot are one, which changes no bits."""
        return self._rows_and_experts[0]

    @cached_property
    def _rows_and_experts(self) -> tuple[list[list[int]], list[RoutedRow]]:
        """The rows, and those among them that are experts' of routers."""
        first, last = 0, None
        rows: list[list[int]] = []
        routed: dict[int, RoutedGate] = {}
        for segment in self.segments:
            router = segment.gate if isinstance(segment.gate, RoutedGate) else None
            if rows and rows[-1][1:3] == [segment.start, segment.slot] and last == router:
                rows[-1][1] = segment.stop
            else:
                if router is not None:
                    routed[len(rows)] = router
                rows.append([segment.start, segment.stop, segment.slot, first])
            first, last = first + segment.stop - segment.start, router
        experts = []
        for row, gate in routed.items():
            start, stop, slot, _ = rows[row]
            experts.append(RoutedRow(row, start, stop, slot, gate))
        return rows, experts

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
                    self.gates.of_segment(segment, module) * weights.scaling,
                    dropout,
                    generator,
                )
            )
        return result

    def token_groups(self, modules: Sequence[int], device: torch.device) -> TokenGroups:
        """Which adapters of `modules` each token has, for a layer that takes tokens out of their order."""
        slots = frozenset(
            segment.slot
            for segment in self.segments
            if any(module in self.bank.layers(segment.slot) for module in modules)
        )
        if slots not in self._groups:
            segments = [segment for segment in self.segments if segment.slot in slots]
            self._groups[slots] = group_tokens(segments, self.num_tokens, device)
        return self._groups[slots]

    def stack(self, module: int) -> LoraStack:
        """The module's active adapters stacked, kept for the following passes of the same layout."""
        known = self._stacks.get(module)
        if known is None or self.gates.change:
            self._stacks[module] = stack_segments(self.lora_segments(module), self.num_tokens, known=known)
        return self._stacks[module]


def _device(segments: Sequence[Segment], bank: WeightProvider) -> torch.device:
    """Where the factors are; the CPU for a plan without any."""
    weights = (own for segment in segments for own in bank.layers(segment.slot).values())
    first = next(weights, None)
    return torch.device("cpu") if first is None else first.lora_a.device
