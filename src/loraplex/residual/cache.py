"""What is kept of linked residuals beside keys and values: u, rank numbers a token.

Here for transformers' caches; an engine keeps it in the blocks of its keys and values (engine/kv/residual_cache.py).
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig

from loraplex.errors import RequestError
from loraplex.residual.modules import LinkedResidual
from loraplex.residual.rows import RowAttention

Key = tuple[int, int]  # attention layer, place in the link


class ResidualStates(Protocol):
    """What keeps u of the tokens before, for a pass over new ones: all that computing residuals asks of a cache."""

    def extend(self, key: Key, sequences: Tensor, u: Tensor) -> Tensor:
        """Keep the new tokens' u [rows, new tokens, rank] of `sequences`, and return that of all tokens."""
        ...


class CacheFollower(Protocol):
    """State whose rows follow a cache's."""

    def reorder_cache(self, beam_idx: Tensor) -> None: ...

    def batch_repeat_interleave(self, repeats: int) -> None: ...

    def batch_select_indices(self, indices: Tensor) -> None: ...

    def crop(self, tokens_to_remove: int) -> None: ...

    def reset(self) -> None: ...


class ResidualState:
    """u of the tokens so far, by layer and place in the link, for the sequences that have a residual there."""

    def __init__(self) -> None:
        self._kept: dict[Key, tuple[Tensor, Tensor]] = {}  # sequences [rows]; u [rows, tokens, rank]
        self.signature: object = None  # of the rows' links, once a pass has run

    def extend(self, key: Key, sequences: Tensor, u: Tensor) -> Tensor:  # [rows, tokens, rank]
        """Add the new tokens' u [rows, new tokens, rank] and return that of all tokens."""
        if key in self._kept:
            before, past = self._kept[key]
            if before.shape != sequences.shape or past.shape[2] != u.shape[2]:
                raise RequestError(
                    f"a cache that was filled for {before.numel()} sequences with residuals is continued with "
                    f"{sequences.numel()}. Continue it with the same rows and links."
                )
            u = torch.cat([past, u], dim=1)
        self._kept[key] = (sequences, u)
        return u

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: sequence i goes on from what sequence beam_idx[i] has."""
        for key, (sequences, u) in self._kept.items():
            sources = beam_idx.to(sequences.device)[sequences]
            places = torch.searchsorted(sequences, sources)
            assert sequences[places.clamp(max=sequences.numel() - 1)].equal(sources), "a beam left its row"
            self._kept[key] = (sequences, u.index_select(0, places))

    def batch_repeat_interleave(self, repeats: int) -> None:
        for key, (sequences, u) in self._kept.items():
            copies = sequences.unsqueeze(1) * repeats + torch.arange(repeats, device=sequences.device)
            self._kept[key] = (copies.flatten(), u.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        for key, (sequences, u) in self._kept.items():
            chosen = torch.isin(indices.to(sequences.device), sequences)
            places = torch.searchsorted(sequences, indices.to(sequences.device)[chosen])
            self._kept[key] = (chosen.nonzero().flatten(), u.index_select(0, places))

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove != 0:
            for key, (sequences, u) in self._kept.items():
                self._kept[key] = (sequences, u[:, : -abs(tokens_to_remove)])

    def reset(self) -> None:
        self._kept.clear()
        self.signature = None

    def items(self) -> list[tuple[Key, Tensor, Tensor]]:
        """Everything that is kept: (layer, place in the link), sequences [rows], u [rows, tokens, rank]."""
        return [(key, sequences, u) for key, (sequences, u) in self._kept.items()]

    @property
    def num_bytes(self) -> int:
        return sum(u.numel() * u.element_size() for _, u in self._kept.values())


class FollowedCache(DynamicCache):
    """transformers' growing KV cache, with state of ours that its rows take along."""

    def __init__(self, config: PreTrainedConfig | None = None) -> None:
        super().__init__(config=config)
        self.followers: list[CacheFollower] = []

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        for follower in self.followers:
            follower.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        for follower in self.followers:
            follower.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        for follower in self.followers:
            follower.batch_select_indices(indices)

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        for follower in self.followers:
            follower.crop(tokens_to_remove)

    def reset(self) -> None:
        super().reset()
        for follower in self.followers:
            follower.reset()


def state_of(cache: Any, rows: Sequence[RowAttention], fed_before: int) -> ResidualState | None:
    """The state that goes with a cache. Raises RequestError if the cache was filled without these rows' residuals."""
    followers = getattr(cache, "followers", None)
    state = next((follower for follower in followers or () if isinstance(follower, ResidualState)), None)
    signature = tuple(
        tuple(
            (place, link.name, link.weight, id(link.residual))
            for place, link in enumerate(row.chain)
            if isinstance(link.residual, LinkedResidual)
        )
        for row in rows
    )
    if not any(signature):
        return state
    if followers is None:
        raise RequestError(
            f"residuals keep numbers beside keys and values, which a {type(cache).__name__} doesn't hold. Pass no "
            "cache, or a loraplex.residual.FollowedCache(config=base.config)."
        )
    if state is None:
        state = ResidualState()
        followers.append(state)
    if fed_before and state.signature != signature:
        raise RequestError(
            "the cache was filled with other residuals than these rows have. Continue it with the same rows and links, "
            "or start with an empty cache."
        )
    state.signature = signature
    return state
