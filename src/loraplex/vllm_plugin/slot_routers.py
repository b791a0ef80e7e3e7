"""Mixtures with routers inside vLLM on a CPU: slot by slot, in fewer operations than static buffers would need.

The same as route_ranks.py, where no graph asks for buffers that never move.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loraplex.vllm_plugin.route_ranks import ALL, ARROW, SIGMOID, SPECTR, TEMPERATURE, TOP_K, TOP_P, WEIGHT
from loraplex.vllm_plugin.routers import SlotRouting, SumRanks


@dataclass(frozen=True, kw_only=True)
class MixtureRoute:
    """One mixture of a slot. `rank` is the engine's largest; columns that a slot doesn't fill hold zeros."""

    kind: int
    read: Tensor  # [modules, rank, experts]: from values in rank space to sums for the experts
    offsets: Tensor | None  # [modules, 1, experts]; None: zeros
    ranks: Tensor  # [experts, rank]: the weight in the link, in the expert's own rank columns
    temperature: float
    top_k: int | None
    top_p: float | None

    def gates(self, values: Tensor, first_module: int) -> Tensor:  # [slices, tokens, rank] -> [.., experts]
        """Without the weight in the link."""
        modules = slice(first_module, first_module + len(values))
        if self.kind == SPECTR:
            scores = torch.bmm(values.square(), self.read[modules]).sqrt_()
        else:
            scores = torch.bmm(values, self.read[modules])
        if self.kind == ARROW:
            scores.abs_()
        if self.offsets is not None:
            scores += self.offsets[modules]
        if self.temperature != 1:
            scores /= self.temperature
        if self.kind == SIGMOID:
            return self._of_top(scores, torch.sigmoid)
        return self._of_top(scores, self._softmax)

    def _softmax(self, scores: Tensor) -> Tensor:
        shares = torch.softmax(scores, dim=-1)
        if self.top_p is None:
            return shares
        largest, columns = shares.sort(dim=-1, descending=True, stable=True)
        largest[largest.cumsum(dim=-1) - largest >= self.top_p] = 0
        return torch.zeros_like(shares).scatter_(-1, columns, largest / largest.sum(dim=-1, keepdim=True))

    def _of_top(self, scores: Tensor, rule: Callable[[Tensor], Tensor]) -> Tensor:
        if self.top_k is None or self.top_k >= scores.shape[-1]:
            return rule(scores)
        largest, columns = scores.topk(self.top_k, dim=-1)
        return torch.zeros_like(scores).scatter_(-1, columns, rule(largest))


@dataclass(frozen=True)
class SlotRoutes:
    """What a slot's tokens go through."""

    ungated: Tensor  # [rank]: 1 in the columns of no routed expert
    mixtures: tuple[MixtureRoute, ...]

    def factors(self, values: Tensor, first_module: int) -> Tensor:
        """What values in rank space [slices, tokens, rank] are multiplied by."""
        flat = self.ungated
        for mixture in self.mixtures:
            gates = mixture.gates(values, first_module)
            flat = torch.addmm(flat, gates.flatten(0, 1), mixture.ranks)
        return flat.view(values.shape)


class SlotRouters:
    """The routers of the slots, and the slots of the batch that runs next."""

    def __init__(self, *, max_rank: int) -> None:
        self._max_rank = max_rank
        self._slots: dict[int, SlotRoutes] = {}
        self._batch: Sequence[int] = ()
        self._groups: list[tuple[SlotRoutes, Tensor | None]] = []  # with their tokens; None: all of them

    def set_slot(self, slot: int, routing: SlotRouting | None) -> None:
        """What a slot holds from now on; None: no mixture with a router."""
        self._slots.pop(slot, None)
        self.forget_batch()  # the next batch is another one, even with the same slots
        if routing is not None:
            self._slots[slot] = make_routes(routing, self._max_rank)

    def set_tokens(self, slots: Sequence[int]) -> None:  # of the tokens; -1 for none
        """The slots of the tokens that run next."""
        if slots == self._batch:
            return
        self._batch, self._groups = slots, []
        for slot in sorted(self._slots.keys() & set(slots)):
            tokens = [token for token, own in enumerate(slots) if own == slot]
            self._groups.append((self._slots[slot], None if len(tokens) == len(slots) else torch.tensor(tokens)))

    def forget_batch(self) -> None:
        """Nothing runs next."""
        self._batch, self._groups = (), []

    def apply(self, x: Tensor | tuple[Tensor, ...], first_module: int, sum_ranks: SumRanks | None = None) -> None:
        """Gate the values in rank space of a layer's slices, in place: [slices, tokens, rank], or one tensor each.

        `sum_ranks` of a layer whose input is sharded: the routers read the sum of what the workers have.
        """
        if not self._groups:
            return
        values = x.clone() if isinstance(x, Tensor) else torch.stack(x)
        if sum_ranks is not None:
            values = sum_ranks(values)
        for part, factors in zip(x, self._factors(values, first_module), strict=True):
            part.mul_(factors)

    def _factors(self, values: Tensor, first_module: int) -> Tensor:
        routes, tokens = self._groups[0]
        if tokens is None:
            return routes.factors(values, first_module)
        factors = torch.ones_like(values)
        for routes, tokens in self._groups:
            factors[:, tokens] = routes.factors(values[:, tokens], first_module)
        return factors


def make_routes(routing: SlotRouting, max_rank: int) -> SlotRoutes:
    """A slot's routing as matrices."""
    rank = len(routing.gate_columns)
    ungated = torch.ones(max_rank)
    ungated[:rank] = (routing.gate_columns == 0).float()
    found = [number for number in routing.mixtures.unique().tolist() if number > 0]
    return SlotRoutes(ungated, tuple(_route(routing, routing.mixtures == number, max_rank) for number in found))


def _route(routing: SlotRouting, is_own: Tensor, max_rank: int) -> MixtureRoute:  # [columns] bool
    columns = is_own.nonzero().flatten()
    settings = routing.settings[:, columns[0]].tolist()
    top_k, top_p = settings[TOP_K], settings[TOP_P]
    rank, modules = len(routing.gate_columns), len(routing.coefficients)
    kind = int(routing.kinds[columns[0]])
    coefficients = routing.squares.expand(modules, -1) if kind == SPECTR else routing.coefficients
    read = torch.zeros(modules, max_rank, len(columns))
    read[:, :rank] = coefficients.unsqueeze(-1) * (routing.score_columns.unsqueeze(-1) == columns)
    ranks = torch.zeros(len(columns), max_rank)
    ranks[:, :rank] = (routing.gate_columns == columns.unsqueeze(-1)) * settings[WEIGHT]
    offsets = routing.offsets[:, columns].unsqueeze(1)
    return MixtureRoute(
        kind=kind,
        read=read,
        offsets=offsets if offsets.any() else None,
        ranks=ranks,
        temperature=settings[TEMPERATURE],
        top_k=None if top_k == ALL else int(top_k),
        top_p=None if top_p == ALL else top_p,
    )
