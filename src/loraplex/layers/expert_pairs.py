"""The (token, expert) pairs of one feed-forward layer in one pass, in the order in which products run over them.

Sorted by expert, then by the adapters that a token has: the pairs of an expert follow each other for the base product,
and those of an expert with the same adapters for the adapters' product. So an expert of an adapter is a segment of
tokens with one pair of factors, as in any other LoRA layer.
"""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from loraplex.kernels.segments import LoraSegment
from loraplex.routing.plan import RoutingPlan
from loraplex.routing.token_groups import NO_SLOT, TokenGroups


class ExpertPairs:
    """The pairs of tokens and the experts that they were sent to."""

    def __init__(self, chosen: Tensor, num_experts: int, groups: TokenGroups) -> None:  # chosen [tokens, top_k]
        self.num_tokens, self.top_k = chosen.shape
        self.num_experts = num_experts
        num_groups = len(groups.slots)
        keys = (chosen * num_groups + groups.groups.unsqueeze(1)).reshape(-1)
        sorted_keys, self.order = torch.sort(keys, stable=True)  # [pairs]: which pair comes where
        self.tokens = self.order // self.top_k  # [pairs]
        self.experts = sorted_keys // num_groups  # [pairs]
        self._groups = groups
        self._counts = torch.bincount(sorted_keys, minlength=num_experts * num_groups)

    @cached_property
    def stops(self) -> Tensor:  # [experts] int32
        """Where each expert's pairs end."""
        return self._counts.view(self.num_experts, -1).sum(dim=1).cumsum(0).to(torch.int32)

    @cached_property
    def restored(self) -> Tensor:  # [pairs]
        """Where each pair of the model's own order lies."""
        return torch.empty_like(self.order).scatter_(
            0, self.order, torch.arange(len(self.order), device=self.order.device)
        )

    @cached_property
    def segments(self) -> Tensor:  # [segments, 5] int64: start, stop, slot, expert, first gate
        """The pairs of one expert and one adapter; a link's adapters have segments over the same pairs."""
        stops, (keys,) = self._counts.cumsum(0), self._counts.nonzero(as_tuple=True)
        starts, num_groups = stops[keys] - self._counts[keys], len(self._groups.slots)
        slots, first_gate, found = self._groups.slots[keys % num_groups], starts, []
        for link in range(slots.shape[1]):
            columns = (starts, stops[keys], slots[:, link], keys // num_groups, first_gate + link * len(self.order))
            found.append(torch.stack(columns, dim=1)[slots[:, link] != NO_SLOT])
        return torch.cat(found)

    @cached_property
    def gates(self) -> Tensor:  # [links * pairs] float32
        """Of every pair, without the LoRA scaling."""
        return self._groups.gates[:, self.tokens].reshape(-1)

    def rows(self, width: int) -> Tensor:  # [segments, 4] int64: start, stop, slot * width + expert, first gate
        """The segments for the compiled kernel, whose table has `width` experts for each slot."""
        known = self._rows.get(width)
        if known is None:
            start, stop, slot, expert, gate = self.segments.unbind(1)
            known = self._rows[width] = torch.stack((start, stop, slot * width + expert, gate), dim=1)
        return known

    @cached_property
    def _rows(self) -> dict[int, Tensor]:
        return {}

    def lora_segments(self, plan: RoutingPlan, module: int) -> Sequence[LoraSegment]:
        """The segments for the torch kernel, with the LoRA scaling folded into their gates."""
        found = []
        for start, stop, slot, expert, first in self.segments.tolist():
            weights = plan.bank.layers(slot).get(module)
            if weights is not None:
                lora_a, lora_b = weights.expert(expert)
                gates = self.gates[first : first + stop - start] * weights.scaling
                found.append(LoraSegment(start, stop, lora_a, lora_b, gates))
        return found
