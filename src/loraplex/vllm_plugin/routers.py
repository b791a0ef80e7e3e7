"""Mixtures with routers inside vLLM: what a slot's rank columns count for, and the buffers that the operator reads."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from loraplex.vllm_plugin.route_ranks import ALL, TEMPERATURE, TOP_K, TOP_P, WEIGHT

SumRanks = Callable[[Tensor], Tensor]  # an all-reduce, which may change what it gets


class Routers(Protocol):
    """What gates the experts of mixtures with routers, for the batch that runs next."""

    def set_slot(self, slot: int, routing: "SlotRouting | None") -> None: ...

    def set_tokens(self, slots: Sequence[int]) -> None: ...

    def forget_batch(self) -> None: ...

    def apply(self, x: Tensor | tuple[Tensor, ...], first_module: int, sum_ranks: SumRanks | None = None) -> None: ...


@dataclass(frozen=True, kw_only=True)
class SlotRouting:
    """The mixtures with routers of one slot. Columns are gate columns, one an expert; column 0 gates nothing."""

    score_columns: Tensor  # [rank]  int64: whose score the values of a rank column count for
    gate_columns: Tensor  # [rank]  int64: whose gate they are multiplied by
    squares: Tensor  # [rank]  float32: 1 where squares of the values are summed
    kinds: Tensor  # [columns]  int64
    mixtures: Tensor  # [columns]  int64: the mixture that an expert belongs to; 0: none
    settings: Tensor  # [4, columns]  float32
    coefficients: Tensor  # [modules, rank]  float32: of the values' sums
    offsets: Tensor  # [modules, columns]  float32: added to scores; -inf where an expert doesn't adapt the module


class RouterBuffers:
    """Static buffers by slot and by token, for `route_ranks_`. A slot or token without routers has zeros.

    Graphs are captured once and run for every batch: the operator is in all of them. On a CPU there are none, and
    slot_routers.py is faster.
    """

    def __init__(
        self,
        *,
        num_modules: int,
        max_tokens: int,
        max_experts: int,
        num_slots: int,
        max_rank: int,
        device: torch.device,
    ) -> None:
        columns, slots = 1 + max_experts, num_slots + 1  # the last slot is that of tokens without an adapter
        self.coefficients = torch.zeros(num_modules, slots, max_rank, device=device)
        self.offsets = torch.zeros(num_modules, slots, columns, device=device)
        self._of_slots = (
            torch.zeros(slots, max_rank, dtype=torch.int64, device=device),
            torch.zeros(slots, max_rank, dtype=torch.int64, device=device),
            torch.zeros(slots, max_rank, device=device),
            torch.zeros(slots, columns, dtype=torch.int64, device=device),
            torch.zeros(slots, columns, columns, device=device),
            _no_settings(columns, device).repeat(slots, 1, 1),
        )
        self._of_tokens = tuple(of_slot.new_zeros(max_tokens, *of_slot.shape[1:]) for of_slot in self._of_slots)
        self.tables = [self.coefficients, self.offsets, *self._of_tokens]
        self.slots = torch.full((max_tokens,), num_slots, dtype=torch.int64, device=device)
        self.no_slot = num_slots
        self._tokens: Sequence[int] = ()
        self._num_tokens = 0
        self._spread(slice(0, max_tokens))

    def set_slot(self, slot: int, routing: SlotRouting | None) -> None:
        """What a slot holds from now on; None: no mixture with a router."""
        self._tokens = ()  # the next batch is another one, even with the same slots
        self.coefficients[:, slot] = 0
        self.offsets[:, slot] = 0
        for table in self._of_slots[:-1]:
            table[slot] = 0
        self._of_slots[-1][slot] = self._of_slots[-1][self.no_slot]
        if routing is None:
            return
        rank, columns = len(routing.score_columns), len(routing.kinds)
        self.coefficients[:, slot, :rank] = routing.coefficients.to(self.slots.device)
        self.offsets[:, slot, :columns] = routing.offsets.to(self.slots.device)
        same = (routing.mixtures[:, None] == routing.mixtures) & (routing.mixtures > 0)
        scores, gates, squares, kinds, of_one_mixture, settings = (table[slot] for table in self._of_slots)
        scores[:rank] = routing.score_columns
        gates[:rank] = routing.gate_columns
        squares[:rank] = routing.squares
        kinds[:columns] = routing.kinds
        of_one_mixture[:columns, :columns] = same
        settings[:, :columns] = routing.settings

    def set_tokens(self, slots: Sequence[int]) -> None:  # of the tokens; -1 for none
        """The slots of the tokens that run next; those behind them, which pad a graph, have none."""
        if slots == self._tokens:
            return
        tokens = torch.tensor(slots, dtype=torch.int64)
        tokens[tokens < 0] = self.no_slot
        last = max(len(slots), self._num_tokens)
        self._tokens, self._num_tokens = slots, len(slots)
        self.slots[len(slots) : last] = self.no_slot
        self.slots[: len(slots)].copy_(tokens, non_blocking=True)
        self._spread(slice(0, last))

    def forget_batch(self) -> None:
        """Nothing runs next."""
        self._tokens = ()

    def _spread(self, tokens: slice) -> None:
        for table, of_slot in zip(self._of_tokens, self._of_slots, strict=True):
            table[tokens] = of_slot[self.slots[tokens]]

    def apply(self, x: Tensor | tuple[Tensor, ...], first_module: int, sum_ranks: SumRanks | None = None) -> None:
        """Gate the values in rank space of a layer's slices, in place: [slices, tokens, rank], or one tensor each.

        `sum_ranks` of a layer whose input is sharded: the routers read the sum of what the workers have.
        """
        values = x if isinstance(x, Tensor) else torch.stack(x)
        whole = None if sum_ranks is None else sum_ranks(values.clone())
        torch.ops.loraplex.route_ranks_(values, whole, self.slots, self.tables, first_module)
        if not isinstance(x, Tensor):
            for part, gated in zip(x, values, strict=True):
                part.copy_(gated)


def _no_settings(columns: int, device: torch.device) -> Tensor:  # [4, columns]
    settings = torch.ones(4, columns, device=device)
    settings[TOP_K] = settings[TOP_P] = ALL
    return settings


def settings_of(
    num_experts: int, *, temperature: float, top_k: int | None, top_p: float | None, weight: float
) -> Tensor:  # [4, experts]
    """One mixture's columns of `SlotRouting.settings`."""
    settings = torch.empty(4, num_experts)
    settings[TEMPERATURE], settings[WEIGHT] = temperature, weight
    settings[TOP_K] = ALL if top_k is None else top_k
    settings[TOP_P] = ALL if top_p is None else top_p
    return settings
