"""A routing plan whose tensors keep their places and sizes, so that a recorded step can be run with other contents."""

import torch

from loraplex.errors import BatchError
from loraplex.kernels.triton.work import SMALL_TILE_TOKENS, SlotFactors, WorkList, cut_work
from loraplex.routing.gates import TableGates
from loraplex.routing.plan import RoutingPlan
from loraplex.routing.routing import Routing
from loraplex.routing.weight_provider import WeightProvider


class StaticPlan(RoutingPlan):
    """For `size` single tokens with up to `capacity` gates; adapts `modules`, with ranks up to `max_rank`.

    Which slots take part, and where their weights lie, is read from tensors at each run: adapters may come and go
    between two runs. Only a module or a rank that was not foreseen needs another plan.
    """

    def __init__(
        self,
        size: int,
        capacity: int,
        bank: WeightProvider,
        *,
        modules: frozenset[int],
        max_rank: int,
        fast_decode: bool,
    ) -> None:
        known = bank.native_table()
        assert known is not None, "recorded steps read the weights' addresses from a table"
        table, scalings = known
        self._gates = torch.zeros(table.shape[1], capacity, device=table.device)
        super().__init__([], size, bank, tokens_per_row=1, fast_decode=fast_decode, gates=TableGates(self._gates))
        self._adapted = set(modules)
        self._items = torch.zeros(size + capacity, 4, dtype=torch.int32, device=table.device)
        self.work = WorkList(self._items[:size], self._items[size:], SMALL_TILE_TOKENS, capacity)
        self.rows = torch.zeros(capacity, 4, dtype=torch.int64)  # those beyond the batch's are empty
        self.factors = SlotFactors(table, scalings, max_rank, table.device.type != "cpu")

    def fill(self, plan: RoutingPlan) -> None:
        """Take over the segments and gates of a plan of at most `size` tokens."""
        tiles, entries = cut_work(plan.row_list, SMALL_TILE_TOKENS)
        size, capacity = len(self.work.tiles), len(self.work.entries)
        assert len(tiles) <= size, f"a batch of {len(tiles)} tiles was padded to {size}"
        assert len(entries) <= capacity, f"a batch of {len(entries)} entries was padded to {capacity}"
        empty = (0, 0, 0, 0)
        padded = tiles + [empty] * (size - len(tiles)) + entries + [empty] * (capacity - len(entries))
        self._items.copy_(torch.tensor(padded, dtype=torch.int32))
        gates = plan.gates.all()
        self._gates[:, : gates.shape[-1]] = gates
        self.rows.zero_()
        self.rows[: len(plan.row_list)] = plan.rows


class StaticRouting(Routing):
    """One plan for everything: all tokens' logits are computed."""

    def __init__(self, plan: StaticPlan, *, fast_decode: bool) -> None:
        self.fast_decode = fast_decode
        self._plan = plan

    def adapts(self, module: int) -> bool:
        return self._plan.adapts(module)

    def plan_for(self, num_sequences: int, tokens_per_sequence: int) -> RoutingPlan:
        num_tokens = num_sequences * tokens_per_sequence
        if num_tokens != self._plan.num_tokens:
            raise BatchError(
                f"a layer got {num_tokens} tokens of a recorded batch of {self._plan.num_tokens}. The engine can't run "
                "models that cut or pool their tokens."
            )
        return self._plan
