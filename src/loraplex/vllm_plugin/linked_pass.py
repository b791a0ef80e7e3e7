"""Linked residuals of the tokens of one pass, whose local responses go through attention as its values."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from loraplex.residual.modules import LinkedResidual, SteeringVector
from loraplex.residual.rows import ChainLink

Tokens = Tensor | slice  # of a pass
# Which of a link's linked residuals, local responses [tokens, rank] -> what each head hears [tokens, heads, rank]
Attend = Callable[[int, Tensor], Tensor]
SumHeads = Callable[[Tensor], Tensor]  # an all-reduce over the workers, which may change what it gets


def token_index(tokens: Sequence[int]) -> Tokens:
    """A slice where tokens follow each other."""
    first, last = tokens[0], tokens[-1]
    return slice(first, last + 1) if last - first + 1 == len(tokens) else torch.tensor(tokens)


@dataclass(frozen=True, kw_only=True)
class LinkedStep:
    """One linked residual at one layer, and the sum of the vectors that stand before it in the link."""

    before: Tensor | None  # [hidden]
    a: Tensor  # [hidden, rank]
    b: Tensor  # [rank, hidden]  weight and alpha/r folded in
    mix: Tensor  # [heads, rank]  of this worker's heads; softmax over all of them

    @property
    def rank(self) -> int:
        return self.b.shape[0]


@dataclass
class LayerSteps:
    """What a link does at one attention layer."""

    steps: list[LinkedStep] = field(default_factory=list)
    after: Tensor | None = None  # [hidden]  the sum of the vectors behind the last linked residual


class LinkedChain:
    """A link's linked residuals, and its vectors on attention blocks, which those behind them read."""

    def __init__(self, chain: Sequence[ChainLink], heads: slice) -> None:
        """`heads` are those of this worker."""
        self.layers: dict[int, LayerSteps] = {}
        for link in chain:
            for layer in link.residual.layers or ():
                if link.weight != 0:
                    self._add(self.layers.setdefault(layer, LayerSteps()), link, layer, heads)

    def _add(self, own: LayerSteps, link: ChainLink, layer: int, heads: slice) -> None:
        residual = link.residual
        if isinstance(residual, SteeringVector):
            vector = residual.vectors[layer].float() * link.weight
            own.after = vector if own.after is None else own.after + vector
            return
        assert isinstance(residual, LinkedResidual), f"{link.name!r} doesn't act on attention"
        weights = residual.layers[layer]
        mix = torch.softmax(weights.head_logits.float(), dim=-1).t()[heads].contiguous()
        scaled = weights.b.float() * (link.weight * residual.config.scaling)
        own.steps.append(LinkedStep(before=own.after, a=weights.a.float().t().contiguous(), b=scaled, mix=mix))
        own.after = None


@dataclass(frozen=True)
class LinkedRoute:
    """The tokens of one slot, and the chain that they go through."""

    chain: LinkedChain
    tokens: Tokens


class LinkedPass:
    """The routes of a pass."""

    def __init__(self, routes: Sequence[LinkedRoute]) -> None:
        self._routes = routes

    def reaches(self, layer: int) -> bool:
        """Whether some token has a residual at an attention layer."""
        return any(layer in route.chain.layers for route in self._routes)

    def residual(
        self,
        layer: int,
        x: Tensor,  # [tokens, hidden]  the attention block's normed input
        attend: Attend,
        sum_heads: SumHeads | None,  # of workers that have some of the heads each
    ) -> Tensor:  # [tokens, hidden]  float32 at least
        """The sum of each token's residuals: the j-th of a link reads x plus the residuals of those before it."""
        routes = [(route.tokens, own) for route in self._routes if (own := route.chain.layers.get(layer)) is not None]
        dtype = torch.promote_types(x.dtype, torch.float32)
        total = torch.zeros(x.shape, dtype=dtype, device=x.device)
        for number in range(max(len(own.steps) for _, own in routes)):
            steps = [(tokens, own.steps[number]) for tokens, own in routes if number < len(own.steps)]
            u = torch.zeros(len(x), max(step.rank for _, step in steps), dtype=dtype, device=x.device)
            for tokens, step in steps:
                if step.before is not None:
                    total[tokens] += step.before
                u[tokens, : step.rank] = (x[tokens].to(dtype) + total[tokens]) @ step.a
            heard = attend(number, u)
            v = torch.zeros_like(u)
            for tokens, step in steps:
                v[tokens, : step.rank] = (heard[tokens, :, : step.rank].to(dtype) * step.mix).sum(dim=1)
            v = v if sum_heads is None else sum_heads(v)
            for tokens, step in steps:
                total[tokens] += v[tokens, : step.rank] @ step.b
        for tokens, own in routes:
            if own.after is not None:
                total[tokens] += own.after
        return total
