"""Which rows of a batch use which mixtures, and the scaling sequences that these need."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loraplex.routing.rows import Route
from loraplex.xlora.mixture import Mixture


@dataclass(frozen=True, kw_only=True)
class MixtureRowGroup:
    """One row that goes through one mixture."""

    row: int
    mixture: Mixture
    weight: float
    slots: tuple[int, ...]  # of the experts, in head order


@dataclass(frozen=True, kw_only=True)
class MixtureGroup:
    """The rows of one mixture, whose scalings one call of the head predicts."""

    mixture: Mixture
    uses: tuple[MixtureRowGroup, ...]
    scaling_rows: tuple[int, ...]  # of each use: the scaling row whose hidden states the head reads
    first_column: int  # of the layer gates; every use has one column an expert

    @property
    def weights(self) -> Tensor:  # [rows]
        return torch.tensor([use.weight for use in self.uses])


@dataclass(frozen=True, kw_only=True)
class MixtureRows:
    """A batch's mixtures. A scaling row is a sequence of the scaling pass, before beams multiply it."""

    groups: tuple[MixtureGroup, ...]
    scaling_rows: tuple[int, ...]  # the batch row of each scaling row
    scaling_groups: tuple[int | None, ...]  # of each scaling row: the group whose experts take part; None: base model

    @property
    def column_rows(self) -> list[int]:
        """The batch row of each column of the layer gates."""
        return [use.row for group in self.groups for use in group.uses for _ in use.slots]

    def main_routes(self, rows: Sequence[Sequence[Route]]) -> list[list[Route]]:
        """The batch's routes with those of the experts, which take their gates from the layer gates."""
        routes = [list(row) for row in rows]
        for group in self.groups:
            for i, use in enumerate(group.uses):
                first = group.first_column + i * len(use.slots)
                routes[use.row] += [Route(slot=slot, column=first + j) for j, slot in enumerate(use.slots)]
        return routes

    def scaling_routes(self) -> list[list[Route]]:
        """The routes of the scaling rows: none where scaling_pass_value is 0, which is the base model."""
        routes: list[list[Route]] = [[] for _ in self.scaling_rows]
        for index, group in enumerate(self.groups):
            for i, use in enumerate(group.uses):
                if self.scaling_groups[group.scaling_rows[i]] == index:
                    first = group.first_column + i * len(use.slots)
                    routes[group.scaling_rows[i]] = [Route(slot=s, column=first + j) for j, s in enumerate(use.slots)]
        return routes

    @property
    def pass_is_base(self) -> bool:
        """Whether every scaling pass is one of the base model itself."""
        return all(group is None for group in self.scaling_groups)


def plan_mixture_rows(uses: Sequence[MixtureRowGroup]) -> MixtureRows:
    """Group the uses by mixture, and give each a scaling row; mixtures of one row whose pass is the base's share it."""
    by_mixture: dict[int, list[MixtureRowGroup]] = {}
    for use in uses:
        by_mixture.setdefault(id(use.mixture), []).append(use)
    groups: list[MixtureGroup] = []
    rows: list[int] = []
    owners: list[int | None] = []
    base_rows: dict[int, int] = {}  # batch row -> scaling row
    column = 0
    for members in by_mixture.values():
        mixture, scaling_rows = members[0].mixture, []
        for use in members:
            if mixture.pass_value == 0:
                scaling_rows.append(_base_row(use.row, base_rows, rows, owners))
            else:
                scaling_rows.append(len(rows))
                rows.append(use.row)
                owners.append(len(groups))
        groups.append(
            MixtureGroup(mixture=mixture, uses=tuple(members), scaling_rows=tuple(scaling_rows), first_column=column)
        )
        column += len(members) * len(mixture.experts)
    return MixtureRows(groups=tuple(groups), scaling_rows=tuple(rows), scaling_groups=tuple(owners))


def _base_row(row: int, known: dict[int, int], rows: list[int], owners: list[int | None]) -> int:
    if row not in known:
        known[row] = len(rows)
        rows.append(row)
        owners.append(None)
    return known[row]
