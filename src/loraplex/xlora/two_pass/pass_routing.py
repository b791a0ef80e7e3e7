"""The routing of a call with mixtures: that of whichever pass runs now."""

from collections.abc import Hashable

from loraplex.routing.gate_record import GateLog
from loraplex.routing.plan import RoutingPlan
from loraplex.routing.routing import Routing
from loraplex.routing.rows import RowRouting


class PassRouting(Routing):
    """The routing of a call: that of the pass which runs now."""

    def __init__(self, main: RowRouting) -> None:
        self.fast_decode = main.fast_decode
        self.now = main
        self.last_pass: tuple[int, int | None] = (0, None)  # what `begin_pass` was told of it

    @property
    def num_rows(self) -> int:
        return self.now.num_rows

    @property
    def is_uniform(self) -> bool:
        return self.now.is_uniform

    @property
    def has_starts(self) -> bool:
        return self.now.has_starts

    @property
    def gate_log(self) -> GateLog | None:
        return self.now.gate_log

    def keep_gates(self) -> None:
        self.now.keep_gates()

    def takes(self, num_sequences: int) -> bool:
        return self.now.takes(num_sequences)

    def routes_of(self, row: int) -> Hashable:
        return self.now.routes_of(row)

    def images_of(self, rows: range) -> Routing:
        return self.now.images_of(rows)

    def adapts(self, module: int) -> bool:
        return self.now.adapts(module)

    def changes(self, path: str) -> bool:
        return self.now.changes(path)

    def begin_pass(self, num_new: int, length: int | None) -> None:
        self.last_pass = (num_new, length)
        self.now.begin_pass(num_new, length)

    def plan_for(self, num_sequences: int, tokens_per_sequence: int) -> RoutingPlan:
        return self.now.plan_for(num_sequences, tokens_per_sequence)

    def uniform_plan(self, num_tokens: int) -> RoutingPlan:
        return self.now.uniform_plan(num_tokens)
