"""The (token, expert) pairs of one feed-forward layer in one pass, in the order in which products run over them.

Sorted by expert, then by the adapters that a token has: the pairs of an expert follow each other for the base product,
and those of an expert with the same adapters for the adapters' product. So an expert of an adapter is a segment of
tokens with one pair of factors, as in any other LoRA layer.
"""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loraplex.kernels.segments import LoraSegment
from loraplex.routing.plan import RoutingPlan
from loraplex.routing.token_groups import NO_SLOT, TokenGroups, run_starts


class ExpertPairs:
    """The pairs of tokens and the experts that they were sent to."""

    def __init__(self, chosen: Tensor, num_experts: int, groups: TokenGroups) -> None:  # chosen [tokens, top_k]
        self.num_experts = num_experts
        self._groups = groups
        self._num_groups = groups.slots.shape[1]
        keys = chosen * self._num_groups + groups.groups.unsqueeze(1)
        self._keys, self.order = torch.sort(keys.reshape(-1), stable=True)  # [pairs]: which pair comes where
        self.tokens = self.order // chosen.shape[1]  # [pairs]

    @cached_property
    def experts(self) -> Tensor:  # [pairs]
        """The expert of each pair."""
        return self._keys // self._num_groups

    @cached_property
    def stops(self) -> Tensor:  # [experts] int32
        """Where each expert's pairs end."""
        numbers = torch.arange(self.num_experts, device=self._keys.device)
        return torch.searchsorted(self.experts, numbers, right=True, out_int32=True)

    def in_own_order(self, y: Tensor) -> Tensor:  # [pairs, ..]
        """Values of the pairs in the order of the tokens and of their choices."""
        return torch.empty_like(y).index_copy_(0, self.order, y)

    @cached_property
    def segments(self) -> NDArray[np.int64]:  # [segments, 5]: start, stop, slot, expert, first gate
        """The pairs of one expert and one adapter; a link's adapters have segments over the same pairs."""
        keys = self._keys.cpu().numpy()
        starts = run_starts(keys)
        stops = np.append(starts[1:], len(keys))
        experts, groups = np.divmod(keys[starts], self._num_groups)
        found = []
        for link, slots in enumerate(self._groups.slots[:, groups]):
            columns = np.stack((starts, stops, slots, experts, starts + link * len(keys)), axis=1)
            found.append(columns[slots != NO_SLOT])
        return np.concatenate(found)

    @cached_property
    def gates(self) -> Tensor:  # [links * pairs] float32, on the CPU
        """Of every pair, without the LoRA scaling."""
        return torch.from_numpy(self._groups.gates[:, self.tokens.cpu().numpy()].reshape(-1))

    def rows(self, width: int) -> Tensor:  # [segments, 4] int64: start, stop, slot * width + expert, first gate
        """The segments for the compiled kernel, whose table has `width` experts for each slot."""
        known = self._rows.get(width)
        if known is None:
            start, stop, slot, expert, gate = self.segments.T
            known = self._rows[width] = torch.from_numpy(np.stack((start, stop, slot * width + expert, gate), axis=1))
        return known

    @cached_property
    def _rows(self) -> dict[int, Tensor]:
        return {}

    def lora_segments(self, plan: RoutingPlan, module: int) -> Sequence[LoraSegment]:
        """The segments for the torch kernel, with the LoRA scaling folded into their gates."""
        found, gates = [], self.gates.to(self.order.device)
        for start, stop, slot, expert, first in self.segments.tolist():
            weights = plan.bank.layers(slot).get(module)
            if weights is not None:
                lora_a, lora_b = weights.expert(expert)
                own = gates[first : first + stop - start] * weights.scaling
                found.append(LoraSegment(start, stop, lora_a, lora_b, own))
        return found
