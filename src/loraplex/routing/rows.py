"""A batch's rows and the routes they take, turned into a routing plan for whatever layout reaches a layer."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from loraplex.errors import BatchError
from loraplex.routing.gate_record import GateLog
from loraplex.routing.layer_gates import GateColumn, LayerGates
from loraplex.routing.plan import RoutingPlan
from loraplex.routing.routing import Routing
from loraplex.routing.segments import RoutedGate, Segment
from loraplex.routing.token_router import TokenRouter
from loraplex.routing.weight_provider import WeightProvider

_MAX_PLANS = 64  # a layer that sees what is in the cache has another layout in every step


@dataclass(frozen=True, kw_only=True)
class Route:
    """One adapter of one row."""

    slot: int
    weight: float = 1.0
    active_from: int | None = None  # aLoRA: the column of the row from which on it is active; None: from the first
    column: int | None = None  # an expert of a mixture: its column of the layer gates, which replace the weight
    router: TokenRouter | None = None  # or what predicts its gates in each layer, which multiply the weight
    expert: int = 0  # its place among the router's
    record: Hashable | None = None  # under what these gates are kept

    def gate(self, length: int) -> "float | GateColumn | RoutedGate":
        """Of a segment of sequences with `length` tokens."""
        if self.router is not None:
            return RoutedGate(self.router, self.expert, self.weight, self.record)
        return self.weight if self.column is None else GateColumn(self.column, length)


class RowRouting(Routing):
    """The routes of every row; a plan for each layout of tokens that layers see.

    A layer may see the rows' tokens as [rows, tokens, features], flattened, expanded by beams (a row's beams
    follow each other), cut to the last tokens (lm_head), with those in the cache before them, or taken from another
    sequence (cross-attention): in each case a row's tokens are contiguous and rows have equal shares.
    """

    def __init__(
        self,
        rows: Sequence[Sequence[Route]],
        bank: WeightProvider,
        *,
        fast_decode: bool = False,
        layer_gates: LayerGates | None = None,
        empty_columns: int = 0,  # before a row's first token, where a layer sees what is in the cache
        gate_log: GateLog | None = None,  # of the routes with a record
    ) -> None:
        self.rows = rows
        self._gate_log = gate_log
        self.bank = bank
        self.fast_decode = fast_decode
        self.layer_gates = layer_gates
        self._empty_columns = empty_columns
        self._starts = [route.active_from for row in rows for route in row if route.active_from is not None]
        self._length: int | None = None
        self._adapted: set[int] | None = None
        self._plans: dict[tuple[int, ...], RoutingPlan] = {}

    @property
    def num_rows(self) -> int:
        return len(self.rows)

    @property
    def is_uniform(self) -> bool:
        """Whether all tokens go through the same adapters with the same gates, so that their order doesn't matter."""
        plain = all(r.active_from is None and r.column is None and r.record is None for r in self.rows[0])
        return plain and all(row == self.rows[0] for row in self.rows[1:])

    @property
    def has_starts(self) -> bool:
        """Whether an adapter begins inside a row, so that the rows' length counts."""
        return bool(self._starts)

    @property
    def gate_log(self) -> GateLog | None:
        """Where routers' gates go that rows want to know."""
        return self._gate_log

    def keep_gates(self) -> None:
        """Take what the pass that has ended wrote of the routers' gates."""
        for key, plan in self._plans.items():
            self._keep_gates(key, plan)

    def _keep_gates(self, key: tuple[int, ...], plan: RoutingPlan) -> None:
        if self._gate_log is not None and plan.gate_record is not None:
            self._gate_log.add(plan.gate_record.take(), copies=key[0] // len(self.rows))

    def adapts(self, module: int) -> bool:
        """Whether any row adapts the module."""
        if self._adapted is None:
            slots = {route.slot for row in self.rows for route in row}
            self._adapted = {module for slot in slots for module in self.bank.layers(slot)}
        return module in self._adapted

    def changes(self, path: str) -> bool:
        """Whether any row's adapter changes the own weights of the module at `path`."""
        return any(path in self.bank.changes(route.slot) for row in self.rows for route in row)

    def takes(self, num_sequences: int) -> bool:
        """Whether so many sequences are the rows, each equally often."""
        return num_sequences % self.num_rows == 0

    def routes_of(self, row: int) -> Hashable:
        return tuple(self.rows[row])

    def images_of(self, rows: range) -> "RowRouting":
        images = RowRouting([self.rows[rows.start]], self.bank)
        if not images.is_uniform:
            raise BatchError(
                f"rows {rows.start} to {rows.stop - 1} have images and adapters with gates for each token (a mixture, "
                "or an aLoRA). Images have no tokens yet: use adapters of the language model only."
            )
        return images

    def begin_pass(self, num_new: int, length: int | None) -> None:
        """Learn how many columns the pass that begins adds to the rows, and how many they then have.

        Some caches don't tell the latter (None): then each pass goes on from the one before.
        """
        if length is None and self._length is not None:
            length = self._length + num_new
        self._length = length

    def plan_for(self, num_sequences: int, tokens_per_sequence: int) -> RoutingPlan:
        """The plan for `num_sequences` sequences: the rows, or a multiple of them (beams)."""
        active = self._active_tokens(tokens_per_sequence) if self._starts else ()
        key = (num_sequences, tokens_per_sequence, *active)
        return self._kept(key, lambda: self._build(num_sequences, tokens_per_sequence))

    def uniform_plan(self, num_tokens: int) -> RoutingPlan:
        """The plan for tokens in any order, where the routing is uniform."""
        return self._kept((num_tokens,), lambda: self._build_uniform(num_tokens))

    def _kept(self, key: tuple[int, ...], build: Callable[[], RoutingPlan]) -> RoutingPlan:
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= _MAX_PLANS:
                oldest = next(iter(self._plans))
                self._keep_gates(oldest, self._plans.pop(oldest))
            plan = self._plans[key] = build()
        return plan

    def _active_tokens(self, length: int) -> list[int]:
        """How many of the last of `length` tokens each aLoRA adapts, in the order of the rows' routes."""
        if self._length is None or length > self._length + self._empty_columns:
            raise BatchError(
                f"a layer sees {length} tokens a row of which it can't be told where in the row they are, but an aLoRA "
                "is active from its invocation on. Use a dynamic cache, or leave the aLoRA out of this call."
            )
        return [min(max(self._length - start, 0), length) for start in self._starts]

    def _build(self, num_sequences: int, length: int) -> RoutingPlan:
        if num_sequences % len(self.rows) != 0:
            raise BatchError(
                f"a layer got {num_sequences} sequences for {len(self.rows)} rows of adapters. The batch must keep its "
                "rows in order, each repeated equally often (as beam search and num_return_sequences do)."
            )
        copies = num_sequences // len(self.rows)
        active = iter(self._active_tokens(length) if self._starts else ())
        ranked: list[tuple[int, Segment]] = []  # place in the row's link, segment
        for row, routes in enumerate(self.rows):
            first = row * copies * length
            for rank, route in enumerate(routes):
                if route.active_from is None:
                    ranked.append((rank, Segment(first, first + copies * length, route.slot, route.gate(length))))
                    continue
                num_active = next(active)
                stops = [first + (copy + 1) * length for copy in range(copies)]
                ranked += [(rank, Segment(stop - num_active, stop, route.slot, route.weight)) for stop in stops]
        # Those of one adapter follow each other, so that a kernel reads it once; a row's own stay in the link's order.
        ranked.sort(key=lambda entry: (entry[0], entry[1].slot, entry[1].start))
        segments = [segment for _, segment in ranked]
        return RoutingPlan(
            segments,
            num_sequences * length,
            self.bank,
            tokens_per_row=copies * length,
            fast_decode=self.fast_decode and length == 1,
            layer_gates=self.layer_gates,
        )

    def _build_uniform(self, num_tokens: int) -> RoutingPlan:
        segments = [Segment(0, num_tokens, route.slot, route.gate(num_tokens)) for route in self.rows[0]]
        return RoutingPlan(segments, num_tokens, self.bank)
