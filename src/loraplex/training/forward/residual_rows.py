"""The attention scope of training batches: each row through its job's residual."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from loraplex.residual.cache import Key, ResidualState
from loraplex.residual.plan import RowPlans
from loraplex.residual.rows import ChainLink, RowAttention
from loraplex.residual.scope import AttentionScope, use_attention
from loraplex.training.forward.batch import PrefixGroup


class ResidualRows:
    """By job, the residuals that its rows go through; none for jobs that train a LoRA alone."""

    def __init__(
        self, chains: Mapping[int, tuple[ChainLink, ...]] | None = None, num_heads: Mapping[int, int] | None = None
    ) -> None:
        self._chains = chains or {}
        self._num_heads = num_heads or {}

    def use(
        self, base: PreTrainedModel, jobs: Sequence[int], state: ResidualState | None = None
    ) -> AbstractContextManager[None]:
        """Run a block with one row for each entry of `jobs`; `state` holds u of what the cache holds."""
        rows = [RowAttention(chain=self._chains.get(job, ())) for job in jobs]
        if not any(row.chain for row in rows):
            return use_attention(None)
        plans, like = RowPlans(rows), torch.empty(0, dtype=base.dtype, device=base.device)
        for layer in self._num_heads:  # now: a layer that runs again in the backward pass would find its own there
            plans.plan(layer, like, len(rows))
        return use_attention(AttentionScope(plans=plans, num_heads=self._num_heads, state=state, cached=False))

    def rank(self, job: int, key: Key) -> int:
        """The rank of the job's residual at a layer and place in the link; 0 where it has none."""
        return RowAttention(chain=self._chains.get(job, ())).rank(*key)


class PrefixResidualStates:
    """u of several groups' shared prefixes, for the batches that continue from them."""

    def __init__(self, rows: ResidualRows, groups: Sequence[PrefixGroup], state: ResidualState) -> None:
        self._rows = rows
        self._kept = {key: (sequences.tolist(), u) for key, sequences, u in state.items()}
        self._places = {group: place for place, group in enumerate(groups)}
        # Batches end their backward passes here, as they do at keys and values.
        self.leaves = {key: u.detach().requires_grad_(u.requires_grad) for key, (_, u) in self._kept.items()}

    @property
    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """What the prefixes' pass computed, and the leaves at which batches left their gradients."""
        return [(u, self.leaves[key]) for key, (_, u) in self._kept.items()]

    def state_for(self, groups: Sequence[PrefixGroup]) -> ResidualState:
        """The state of a batch with one row for each entry of `groups`."""
        state = ResidualState()
        for key, (sequences, _) in self._kept.items():
            ranks = [self._rows.rank(job, key) for job, _ in groups]
            here = [row for row, rank in enumerate(ranks) if rank > 0]
            if not here:
                continue
            # A group without a prefix borrows any other's, which its attention mask hides.
            places = [sequences.index(p) if (p := self._places.get(groups[row])) in sequences else 0 for row in here]
            leaf = self.leaves[key]
            u = leaf.index_select(0, torch.tensor(places, device=leaf.device))
            rank = max(ranks)
            missing = rank - u.shape[2]
            u = torch.nn.functional.pad(u, (0, missing)) if missing > 0 else u[:, :, :rank]
            state.extend(key, torch.tensor(here, device=leaf.device), u)
        return state
