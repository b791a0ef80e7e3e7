"""A batch's rows and the routes they take, turned into a routing plan for whatever layout reaches a layer."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from loraplex.errors import BatchError
from loraplex.routing.bank import Bank
from loraplex.routing.layer_gates import GateColumn, LayerGates
from loraplex.routing.plan import RoutingPlan, Segment


@dataclass(frozen=True, kw_only=True)
class Route:
    """One adapter of one row."""

    slot: int
    weight: float = 1.0
    last_tokens: int | None = None  # aLoRA: active on the row's last tokens only; None means on all
    column: int | None = None  # an expert of a mixture: its column of the layer gates, which replace the weight


class RowRouting:
    """The routes of every row; a plan for each layout of tokens that layers see.

    A layer may see the rows' tokens as [rows, tokens, features], flattened, expanded by beams (a row's beams
    follow each other), cut to the last tokens (lm_head) or taken from another sequence (cross-attention): in
    each case a row's tokens are contiguous and rows have equal shares.
    """

    def __init__(
        self,
        rows: Sequence[Sequence[Route]],
        bank: Bank,
        *,
        fast_decode: bool = False,
        layer_gates: LayerGates | None = None,
    ) -> None:
        self.rows = rows
        self.bank = bank
        self.fast_decode = fast_decode
        self.layer_gates = layer_gates
        self._plans: dict[tuple[int, int], RoutingPlan] = {}

    @property
    def num_rows(self) -> int:
        return len(self.rows)

    def plan_for(self, num_sequences: int, tokens_per_sequence: int) -> RoutingPlan:
        """The plan for `num_sequences` sequences: the rows, or a multiple of them (beams)."""
        key = (num_sequences, tokens_per_sequence)
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = self._build(num_sequences, tokens_per_sequence)
        return plan

    def _build(self, num_sequences: int, length: int) -> RoutingPlan:
        if num_sequences % len(self.rows) != 0:
            raise BatchError(
                f"a layer got {num_sequences} sequences for {len(self.rows)} rows of adapters. The batch must keep its "
                "rows in order, each repeated equally often (as beam search and num_return_sequences do)."
            )
        copies = num_sequences // len(self.rows)
        ranked: list[tuple[int, Segment]] = []  # place in the row's link, segment
        for row, routes in enumerate(self.rows):
            first = row * copies * length
            for rank, route in enumerate(routes):
                if route.last_tokens is None:
                    gate = route.weight if route.column is None else GateColumn(route.column, length)
                    ranked.append((rank, Segment(first, first + copies * length, route.slot, gate)))
                    continue
                active = min(route.last_tokens, length)
                stops = [first + (copy + 1) * length for copy in range(copies)]
                ranked += [(rank, Segment(stop - active, stop, route.slot, route.weight)) for stop in stops]
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


_current: ContextVar[RowRouting | None] = ContextVar("loraplex_current_routing", default=None)


def current_routing() -> RowRouting | None:
    """The routing of the forward pass that runs now; None outside of one."""
    return _current.get()


@contextmanager
def use_routing(routing: RowRouting) -> Iterator[None]:
    """Let the LoRA layers follow `routing` inside the block. It is scoped because transformers owns the signatures."""
    token = _current.set(routing)
    try:
        yield
    finally:
        _current.reset(token)
