"""The static buffers that the gate operator reads: gates, rank columns and slots of the tokens that run now."""

from collections.abc import Sequence

import torch
from torch import Tensor

from loraplex.vllm_plugin import gate_op  # noqa: F401  (registers the operator)

PLAIN = 0  # the gate column of everything that no scaling head gates


class GateBuffers:
    """Gates [modules, tokens, 1 + experts]. Column PLAIN is 1, but 0 in scaling passes of tokens with a mixture."""

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
        self.gates = torch.ones(num_modules, max_tokens, 1 + max_experts, dtype=torch.float32, device=device)
        self.columns = torch.zeros(num_slots + 1, max_rank, dtype=torch.int64, device=device)
        self.slots = torch.full((max_tokens,), num_slots, dtype=torch.int64, device=device)
        self.no_slot = num_slots
        self._num_tokens = 0
        # On a GPU graphs are captured once and run for every batch: the operator must always be in them.
        self.is_always_on = device.type != "cpu"
        self.is_on = False  # elsewhere: whether any token of this pass has gates

    def set_columns(self, slot: int, columns: Tensor | None) -> None:  # [rank]
        """What a slot's rank columns are gated by; None: by nothing."""
        self.columns[slot] = PLAIN
        if columns is not None:
            self.columns[slot, : len(columns)] = columns.to(self.columns.device)

    def set_slots(self, slots: Sequence[int]) -> None:  # of the tokens; -1 for none
        """The slots of the tokens that run next; those behind them, which pad a graph, have none."""
        tokens = torch.tensor(slots, dtype=torch.int64)
        tokens[tokens < 0] = self.no_slot
        self.slots[len(slots) : max(len(slots), self._num_tokens)] = self.no_slot
        self.slots[: len(slots)].copy_(tokens, non_blocking=True)
        self._num_tokens = len(slots)

    def apply(self, x: Tensor | tuple[Tensor, ...], first_module: int) -> None:
        """Gate the values in rank space of a layer's slices, in place: [slices, tokens, rank], or one tensor each."""
        if not (self.is_always_on or self.is_on):
            return
        if isinstance(x, Tensor):
            torch.ops.loraplex.gate_ranks_(x, self.gates, self.columns, self.slots, first_module)
            return
        for i, part in enumerate(x):
            torch.ops.loraplex.gate_ranks_(part.unsqueeze(0), self.gates, self.columns, self.slots, first_module + i)
