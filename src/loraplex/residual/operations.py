"""What a row's interventions do at each place, in the order of its link, weights folded in."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from loraplex.residual.gates import GateResidual
from loraplex.residual.modules import Residual, SteeringVector
from loraplex.residual.positions import ALL, Positions
from loraplex.residual.reft import Intervention, ReftResidual, Site
from loraplex.residual.rows import ChainLink

SiteKey = tuple[Site, int]  # and the block's number
Active = frozenset[Positions]


@dataclass(frozen=True, eq=False)
class VectorOperation:
    """h + vector."""

    positions: Positions
    vector: Tensor  # [hidden]  float32

    def run(self, hidden: Tensor) -> Tensor:
        """hidden [tokens, hidden], changed; in its dtype, float32 at least."""
        return hidden + self.vector


@dataclass(frozen=True, eq=False)
class LowRankOperation:
    """h + scale R^T (read h + b)."""

    positions: Positions
    intervention: Intervention
    scale: float

    def run(self, hidden: Tensor) -> Tensor:
        """hidden [tokens, hidden], changed; in its dtype, float32 at least."""
        own = self.intervention
        seen = hidden @ own.read.to(hidden).t() + own.b.to(hidden)
        return hidden + (seen * self.scale) @ own.r.to(hidden)


Operation = VectorOperation | LowRankOperation


class ChainOperations:
    """The interventions of one row's link."""

    def __init__(self, chain: Sequence[ChainLink]) -> None:
        self.sites: dict[SiteKey, list[Operation]] = {}
        self.inputs: dict[str, Tensor] = {}  # gates by module path, float32
        self.outputs: dict[str, Tensor] = {}
        self._vectors: dict[Active, Mapping[SiteKey, Tensor]] = {}
        for link in chain:
            if link.weight != 0:
                self._add(link)
        operations = [operation for all_ in self.sites.values() for operation in all_]
        everywhere = (ALL,) if self.has_gates else ()
        self.positions = tuple(dict.fromkeys((*everywhere, *(operation.positions for operation in operations))))
        self._low_rank = {o.positions for o in operations if isinstance(o, LowRankOperation)}

    @property
    def has_gates(self) -> bool:
        return bool(self.inputs or self.outputs)

    @property
    def depends_on_prompt(self) -> bool:
        """Whether one must know where the prompt ends."""
        return any(positions.depends_on_prompt for positions in self.positions)

    def adds_only(self, active: Active) -> bool:
        """Whether all that is done where these positions are active is to add vectors."""
        return self._low_rank.isdisjoint(active)

    def vectors(self, active: Active) -> Mapping[SiteKey, Tensor]:  # [hidden] each
        """The sums of the vectors at each site where these positions are active."""
        if active not in self._vectors:
            sums: dict[SiteKey, Tensor] = {}
            for key, operations in self.sites.items():
                for operation in operations:
                    if isinstance(operation, VectorOperation) and operation.positions in active:
                        vector = operation.vector
                        sums[key] = sums[key] + vector if key in sums else vector
            self._vectors[active] = sums
        return self._vectors[active]

    def _add(self, link: ChainLink) -> None:
        residual, weight = link.residual, link.weight
        if isinstance(residual, SteeringVector):
            for block, vector in residual.vectors.items():
                operations = self.sites.setdefault((residual.site, block), [])
                operations.append(VectorOperation(residual.positions, (vector.float() * weight).contiguous()))
        elif isinstance(residual, ReftResidual):
            for own in residual.interventions:
                operations = self.sites.setdefault((own.site, own.block), [])
                operations.append(LowRankOperation(own.positions, own, weight))
        else:
            assert isinstance(residual, GateResidual), f"{link.name!r} is no intervention"
            for gates, added in ((self.inputs, residual.inputs), (self.outputs, residual.outputs)):
                for path, gate in added.items():
                    scaled = gate.float() if weight == 1 else 1 + weight * (gate.float() - 1)
                    gates[path] = gates[path] * scaled if path in gates else scaled


def is_intervention(residual: Residual) -> bool:
    """Whether a residual acts on blocks or linear modules by itself, without looking at what a token attends to."""
    if isinstance(residual, SteeringVector):
        return residual.site != "attention" or residual.positions.which != "all"
    return isinstance(residual, ReftResidual | GateResidual)


def positions_of(residual: Residual) -> frozenset[Positions]:
    """The tokens that a residual acts on."""
    if isinstance(residual, SteeringVector):
        return frozenset({residual.positions})
    if isinstance(residual, ReftResidual):
        return frozenset(own.positions for own in residual.interventions)
    return frozenset({ALL})


def interventions_of(chain: Sequence[ChainLink], *, with_vectors: bool) -> tuple[ChainLink, ...]:
    """The links of a chain that are interventions.

    With `with_vectors`, so are vectors on attention blocks where nothing else of the row looks at what the block
    attends to: no residual reads what the ones before it added.
    """
    others = [link for link in chain if not is_intervention(link.residual)]
    if with_vectors and all(isinstance(link.residual, SteeringVector) for link in others):
        return tuple(chain)
    return tuple(link for link in chain if is_intervention(link.residual))
