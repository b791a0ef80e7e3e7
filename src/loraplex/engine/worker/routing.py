"""The routing of an input batch: the slots and gates of each token."""

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor

from loraplex.engine.kv.sequence_kv import SequenceRoute
from loraplex.engine.worker.input_batch import InputBatch
from loraplex.engine.worker.mixture_gates import MixtureGates
from loraplex.errors import BatchError
from loraplex.routing.gates import TableGates, gate_row
from loraplex.routing.layer_gates import GateColumn
from loraplex.routing.plan import RoutingPlan
from loraplex.routing.routing import Routing
from loraplex.routing.segments import RoutedGate, Segment
from loraplex.routing.weight_provider import WeightProvider


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


def packed_plan(
    placed: Sequence[RouteSpan],
    batch: InputBatch,
    gates: MixtureGates,
    bank: WeightProvider,
    *,
    fast_decode: bool,
    batch_invariant: bool,
) -> RoutingPlan:
    """The plan of some of a batch's tokens, whose experts take their gates from `gates`."""
    segments: list[Segment] = []
    own: list[int] = []  # indices of the experts' gates among all gates
    columns: list[int] = []  # where the mixtures' gates have them
    num_gates = 0
    for item, route in _adapter_by_adapter(placed, batch):
        stop = item.start + item.num_tokens
        start = item.start if route.active_from is None else max(item.start, route.active_from)
        if start >= stop:
            continue
        gate: float | GateColumn | RoutedGate = route.weight
        if route.router is not None:
            record = (item.chunk, route.mixture) if batch.chunks[item.chunk].wants_scalings else None
            gate = RoutedGate(route.router, route.expert, route.weight, record)
        if route.use is not None:
            gate = GateColumn(num_gates, stop - start)
            own += range(num_gates, num_gates + stop - start)
            columns += gates.columns(item.chunk, route.use, route.expert, start, stop)
        first = item.first + start - item.start
        segments.append(Segment(first, first + stop - start, route.slot, gate))
        num_gates += stop - start
    table = gate_row(segments, bank).unsqueeze(0)  # [1 or modules, gates]
    if columns:
        table = table.repeat(gates.values.shape[0], 1)
        table[:, own] = gates.values[:, columns].to(table.dtype)
    num_tokens = sum(item.num_tokens for item in placed)
    longest = max((item.num_tokens for item in placed), default=1)
    return RoutingPlan(
        segments,
        num_tokens,
        bank,
        tokens_per_row=longest,
        fast_decode=fast_decode,
        batch_invariant=batch_invariant,
        gates=TableGates(table),
    )


class PackedRouting(Routing):
    """One plan for all tokens, one for those whose logits are wanted, and others for chunks that run by themselves.

    The output layer sees the second kind, state mixers the third.
    """

    def __init__(
        self,
        batch: InputBatch,
        gates: MixtureGates,
        bank: WeightProvider,
        *,
        fast_decode: bool,
        batch_invariant: bool,
    ) -> None:
        self.fast_decode, self._batch_invariant = fast_decode, batch_invariant
        self._batch, self._gates, self._bank = batch, gates, bank
        placed = [
            RouteSpan(i, first, chunk.start, chunk.count)
            for i, (first, chunk) in enumerate(zip(batch.offsets, batch.chunks, strict=True))
        ]
        self._all = self._plan(placed)
        self._selected: RoutingPlan | None = None
        self._by_parts: dict[tuple[int, int], RoutingPlan] = {}
        self._only: RoutingPlan | None = None  # of the chunks that run by themselves now

    @property
    def plan(self) -> RoutingPlan:
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

    def adapts(self, module: int) -> bool:
        return self._all.adapts(module)

    def changes(self, path: str) -> bool:
        return self._all.changes(path)

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

    def keep_gates(self) -> None:
        """Keep what routers predicted for chunks that want to know it, once the pass has run."""
        plans = [self._all, *([] if self._selected is None else [self._selected]), *self._by_parts.values()]
        for plan in plans:
            for record, gates in () if plan.gate_record is None else plan.gate_record.take():
                self._keep(record, gates)

    def _keep(self, record: Hashable, gates: Tensor) -> None:  # [tokens, modules, experts]
        assert isinstance(record, tuple), "gates were kept for something else than a chunk's mixture"
        chunk, place = record
        binding = self._batch.chunks[chunk].sequence.state.binding
        assert binding is not None, "a sequence runs without its adapters"
        kept = self._batch.kept_scalings(chunk)
        modules = list(binding.all_mixtures[place].mixture.modules)
        if len(kept[place]) == 0:
            kept[place] = gates.new_zeros(self._batch.chunks[chunk].count, len(modules), gates.shape[2])
        kept[place][-len(gates) :] += gates[:, modules]  # the output layer may see the last tokens alone

    def _plan_of_parts(self, first: int, stop: int) -> RoutingPlan:
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

    def _plan(self, placed: Sequence[RouteSpan]) -> RoutingPlan:
        return packed_plan(
            placed,
            self._batch,
            self._gates,
            self._bank,
            fast_decode=self.fast_decode,
            batch_invariant=self._batch_invariant,
        )
