"""The routing of an input batch: the slots and gates of each token, those of mixtures predicted by their heads."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from loraplex.engine.kv.sequence_kv import SequenceRoute
from loraplex.engine.sched.request_adapters import BoundMixture, RequestAdapters
from loraplex.engine.worker.input_batch import InputBatch, ScheduledChunk
from loraplex.errors import BatchError
from loraplex.routing.layer_gates import GateColumn
from loraplex.routing.plan import RoutingPlan, Segment
from loraplex.routing.rows import RowRouting
from loraplex.routing.weight_provider import WeightProvider
from loraplex.xlora.mixture import Mixture


class MixtureGates:
    """Gates [modules, columns]; a column is one expert at one token of one chunk."""

    def __init__(self, batch: InputBatch) -> None:
        main: dict[Mixture, list[tuple[int, int]]] = {}  # part and use, by mixture
        passes: dict[Mixture, list[tuple[int, int]]] = {}
        for i, chunk in enumerate(batch.chunks):
            for use in sorted({route.use for route in chunk.kv.routes if route.use is not None}):
                groups = main if chunk.scaling is None else passes
                groups.setdefault(_bound(chunk, use).mixture, []).append((i, use))
        self._batch = batch
        self._places: dict[tuple[int, int], tuple[int, int, int]] = {}  # first column, columns an expert, position
        self._num_columns = 0
        tables = [self._main_gates(mixture, members) for mixture, members in main.items()]
        tables += [self._pass_gates(mixture, members) for mixture, members in passes.items()]
        self.values = torch.cat(tables, dim=1) if tables else torch.zeros(0, 0)

    def columns(self, chunk: int, use: int, expert: int, start: int, stop: int) -> range:
        """The columns of an expert at the positions [start, stop)."""
        first, stride, position = self._places[chunk, use]
        column = first + expert * stride + start - position
        return range(column, column + stop - start)

    def _main_gates(self, mixture: Mixture, members: list[tuple[int, int]]) -> Tensor:  # [modules, columns]
        hidden, weights = [], []
        for i, use in members:
            chunk = self._batch.chunks[i]
            bound = _bound(chunk, use)
            hidden.append(chunk.sequence.scalings[bound.scaling].hidden(chunk.start, chunk.stop))
            weights += [bound.weight] * chunk.count
        scalings = mixture.head(torch.cat(hidden))  # [tokens, lora_layers, experts]
        self._keep_wanted(members, scalings)
        gates = mixture.gates(scalings[None, None], torch.ones(1))[:, :, 0]  # [modules, experts, tokens]
        return self._place(members, gates * torch.tensor(weights, device=gates.device))

    def _keep_wanted(self, members: list[tuple[int, int]], scalings: Tensor) -> None:
        """Give the scalings to the chunks whose requests want them, in the order of their links."""
        offset = 0
        for i, use in members:
            chunk = self._batch.chunks[i]
            captures = chunk.sequence.captures
            if captures is not None and captures.wants_scalings:
                kept = self._batch.scalings.setdefault(i, [scalings[:0]] * _num_mixtures(chunk))
                kept[use] = scalings[offset : offset + chunk.count]
            offset += chunk.count

    def _pass_gates(self, mixture: Mixture, members: list[tuple[int, int]]) -> Tensor:  # [modules, columns]
        num_tokens = sum(self._batch.chunks[i].count for i, _ in members)
        return self._place(members, mixture.pass_gates(1, 1, num_tokens)[:, :, 0])

    def _place(self, members: list[tuple[int, int]], gates: Tensor) -> Tensor:
        num_tokens, offset = gates.shape[2], 0
        for i, use in members:
            chunk = self._batch.chunks[i]
            self._places[i, use] = (self._num_columns + offset, num_tokens, chunk.start)
            offset += chunk.count
        self._num_columns += gates.shape[1] * num_tokens
        return gates.flatten(1)


def _bound(chunk: ScheduledChunk, use: int) -> BoundMixture:
    return _binding(chunk).mixtures[use]


def _num_mixtures(chunk: ScheduledChunk) -> int:
    return len(_binding(chunk).mixtures)


def _binding(chunk: ScheduledChunk) -> RequestAdapters:
    binding = chunk.sequence.state.binding
    assert binding is not None, "a sequence runs without its adapters"
    return binding


class RouteSpan(NamedTuple):
    """Tokens of one chunk as a layer sees them."""

    chunk: int
    first: int  # place of the first token
    start: int  # its position in the sequence
    num_tokens: int


def _adapter_by_adapter(placed: Sequence[RouteSpan], batch: InputBatch) -> list[tuple[RouteSpan, SequenceRoute]]:
    """The chunks' routes, those through one adapter one after the other; a chunk's own stay in the order of its link.

    The compiled kernel reads an adapter once for tokens that follow each other, with the same bits for each.
    """
    ranked = [
        (rank, route.slot, item.first, item, route)
        for item in placed
        for rank, route in enumerate(batch.chunks[item.chunk].kv.routes)
    ]
    return [(item, route) for _, _, _, item, route in sorted(ranked, key=lambda entry: entry[:3])]


class PackedPlan(RoutingPlan):
    """A plan whose experts take their gates from a table [modules, gates] instead of layer gates."""

    def __init__(
        self,
        placed: Sequence[RouteSpan],
        batch: InputBatch,
        gates: MixtureGates,
        bank: WeightProvider,
        *,
        fast_decode: bool,
    ) -> None:
        segments: list[Segment] = []
        own: list[int] = []  # places of the experts' gates among all gates
        columns: list[int] = []  # where the mixtures' gates have them
        num_gates = 0
        for item, route in _adapter_by_adapter(placed, batch):
            stop = item.start + item.num_tokens
            start = item.start if route.active_from is None else max(item.start, route.active_from)
            if start >= stop:
                continue
            gate: float | GateColumn = route.weight
            if route.use is not None:
                gate = GateColumn(num_gates, stop - start)
                own += range(num_gates, num_gates + stop - start)
                columns += gates.columns(item.chunk, route.use, route.expert, start, stop)
            first = item.first + start - item.start
            segments.append(Segment(first, first + stop - start, route.slot, gate))
            num_gates += stop - start
        num_tokens = sum(item.num_tokens for item in placed)
        longest = max((item.num_tokens for item in placed), default=1)
        super().__init__(segments, num_tokens, bank, tokens_per_row=longest, fast_decode=fast_decode)
        self._by_module: tuple[Tensor, ...] = ()
        self._gate_rows = self._gate_table[0].unsqueeze(0)  # [1 or modules, gates]
        if columns:
            self._gate_rows = self._gate_rows.repeat(gates.values.shape[0], 1)
            self._gate_rows[:, own] = gates.values[:, columns].to(self._gate_rows.dtype)
            self._by_module = self._gate_rows.unbind(0)

    @property
    def has_dora_scales(self) -> bool:
        """Whether a DoRA adapter takes a share of any module's base output."""
        return bool(self._gained)

    def all_gates(self) -> Tensor:
        return self._gate_rows

    def gates_of(self, module: int) -> Tensor:
        return self._by_module[module] if self._by_module else super().gates_of(module)

    def gate_of(self, segment: Segment, module: int) -> float | Tensor:
        if isinstance(segment.gate, GateColumn):
            return self._by_module[module][segment.gate.column : segment.gate.column + segment.gate.length]
        return segment.gate


class PackedRouting(RowRouting):
    """One plan for all tokens, one for those whose logits are wanted, and others for chunks that run by themselves.

    The output layer sees the second kind, state mixers the third.
    """

    def __init__(self, batch: InputBatch, bank: WeightProvider, *, fast_decode: bool) -> None:
        super().__init__([()], bank, fast_decode=fast_decode)
        self._batch = batch
        self._gates = MixtureGates(batch)
        placed = [
            RouteSpan(i, first, chunk.start, chunk.count)
            for i, (first, chunk) in enumerate(zip(batch.offsets, batch.chunks, strict=True))
        ]
        self._all = self._plan(placed)
        self._selected: PackedPlan | None = None
        self._by_parts: dict[tuple[int, int], PackedPlan] = {}
        self._only: PackedPlan | None = None  # of the chunks that run by themselves now

    @property
    def plan(self) -> PackedPlan:
        """The plan for all tokens."""
        return self._all

    @contextmanager
    def only(self, first: int, stop: int) -> Iterator[None]:
        """Let layers see the tokens of the chunks [first, stop) alone inside the block."""
        self._only = self._plan_of_parts(first, stop)
        try:
            yield
        finally:
            self._only = None

    @property
    def is_uniform(self) -> bool:
        return False

    def adapts(self, module: int) -> bool:
        return self._all.adapts(module)

    def plan_for(self, num_sequences: int, tokens_per_sequence: int) -> RoutingPlan:
        num_tokens = num_sequences * tokens_per_sequence
        if self._only is not None:
            if num_tokens != self._only.num_tokens:
                raise BatchError(
                    f"a layer got {num_tokens} tokens of a state mixer that runs {self._only.num_tokens}. The engine "
                    "can't run models that cut or pool their tokens."
                )
            return self._only
        if num_tokens == self._batch.num_tokens:
            return self._all
        if num_tokens != self._batch.num_selected:
            raise BatchError(
                f"a layer got {num_tokens} tokens of a packed batch of {self._batch.num_tokens}, of which "
                f"{self._batch.num_selected} want logits. The engine can't run models that cut or pool their tokens."
            )
        if self._selected is None:
            placed, first = [], 0
            for i, chunk in enumerate(self._batch.chunks):
                if chunk.num_logits:
                    placed.append(RouteSpan(i, first, chunk.stop - chunk.num_logits, chunk.num_logits))
                    first += chunk.num_logits
            self._selected = self._plan(placed)
        return self._selected

    def _plan_of_parts(self, first: int, stop: int) -> PackedPlan:
        if (first, stop) == (0, len(self._batch.chunks)):
            return self._all
        if (first, stop) not in self._by_parts:
            offset = self._batch.offsets[first]
            placed = [
                RouteSpan(i, self._batch.offsets[i] - offset, chunk.start, chunk.count)
                for i, chunk in enumerate(self._batch.chunks[first:stop], first)
            ]
            self._by_parts[first, stop] = self._plan(placed)
        return self._by_parts[first, stop]

    def _plan(self, placed: Sequence[RouteSpan]) -> PackedPlan:
        return PackedPlan(placed, self._batch, self._gates, self.bank, fast_decode=self.fast_decode)
