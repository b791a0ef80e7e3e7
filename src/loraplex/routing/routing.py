"""What LoRA layers ask of the pass that runs: the plan for the tokens that reach them."""

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

from loraplex.errors import BatchError
from loraplex.routing.gate_record import GateLog
from loraplex.routing.plan import RoutingPlan


class Routing(Protocol):
    """The defaults are those of one row of tokens, whose order counts and whose adapters are active from the first."""

    fast_decode: bool  # whether single-token steps run base product and adapters in one compiled call

    @property
    def num_rows(self) -> int:
        return 1

    @property
    def is_uniform(self) -> bool:
        """Whether all tokens go through the same adapters with the same gates, so that their order doesn't matter."""
        return False

    @property
    def has_starts(self) -> bool:
        """Whether an adapter begins inside a row, so that the rows' length counts."""
        return False

    @property
    def gate_log(self) -> GateLog | None:
        """Where routers' gates go that rows want to know."""
        return None

    def keep_gates(self) -> None:
        """Take what the pass that has ended wrote of them."""
        return

    def begin_pass(self, num_new: int, length: int | None) -> None:
        """Learn how many columns the pass that begins adds to the rows, and how many they then have."""
        return

    def adapts(self, module: int) -> bool:
        """Whether any row adapts the module."""
        ...

    def changes(self, path: str) -> bool:
        """Whether any row's adapter changes the own weights of the module at `path`."""
        return False

    def takes(self, num_sequences: int) -> bool:
        """Whether so many sequences are the rows, each equally often."""
        return True

    def plan_for(self, num_sequences: int, tokens_per_sequence: int) -> RoutingPlan:
        """The plan for `num_sequences` sequences. Raises BatchError for a layout that the routing doesn't know."""
        ...

    def uniform_plan(self, num_tokens: int) -> RoutingPlan:
        """The plan for tokens in any order, where the routing is uniform."""
        raise BatchError(f"a layer got {num_tokens} tokens in an unknown order, but their adapters differ.")

    def routes_of(self, row: int) -> Hashable:
        """What tells whether two rows go through the same adapters."""
        return row

    def images_of(self, rows: range) -> "Routing":
        """The routing of these neighbouring rows' images, where all of them go through the same adapters.

        Raises BatchError where adapters begin inside a row, or have gates for its tokens.
        """
        raise BatchError("the images of these rows can't be told apart.")


_current: ContextVar[Routing | None] = ContextVar("loraplex_current_routing", default=None)


def current_routing() -> Routing | None:
    """The routing of the forward pass that runs now; None outside of one."""
    return _current.get()


@contextmanager
def use_routing(routing: Routing) -> Iterator[None]:
    """Let the LoRA layers follow `routing` inside the block. It is scoped because transformers owns the signatures."""
    token = _current.set(routing)
    try:
        yield
    finally:
        _current.reset(token)
