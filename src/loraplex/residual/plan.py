"""What one attention layer has to do for the rows of a batch, in one layout of sequences."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loraplex.errors import AdapterError
from loraplex.residual.capture import CaptureBuffer
from loraplex.residual.links import FunctionTerm, LinkedTerm, ResidualTerm, VectorTerm, stack_linked
from loraplex.residual.modules import FunctionResidual, LinkedResidual, SteeringVector
from loraplex.residual.rows import ChainLink, RowAttention
from loraplex.residual.steering import Steering, log_strengths

RouteSpan = list[tuple[int, ChainLink]]  # places among the rows concerned, in order


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """What one attention layer does for one layout of sequences."""

    index: Tensor | None  # [rows] the sequences concerned; None is all of them
    sequences: Tensor  # [rows] the same, always there
    links: Sequence[Sequence[ResidualTerm]]  # by place in the link
    captures: Sequence[tuple[int, CaptureBuffer]]  # place among the rows concerned, where to
    steered: Sequence[tuple[int, Sequence[Steering], int]]  # place, steerings, padding on the left

    def log_strength(self, num_heads: int, first_key: int, num_keys: int) -> Tensor | None:
        """What steering adds to the logits [rows, heads, keys] of the keys from one on; None if no row is steered."""
        if not self.steered:
            return None
        num_rows, device = self.sequences.numel(), self.sequences.device
        return log_strengths(self.steered, num_rows, num_heads, first_key, num_keys, device)


@dataclass(frozen=True, kw_only=True)
class LayerPlanner:
    """Builds the plans of one layer from what the rows ask for."""

    layer: int
    rows: Sequence[RowAttention]
    paddings: Sequence[int]
    buffers: Mapping[int, CaptureBuffer]
    failures: dict[int, AdapterError] | None
    dtype: torch.dtype  # of computing
    device: torch.device

    def build(self, copies: int, num_sequences: int) -> LayerPlan | None:
        """The plan for `copies` sequences a row, which stand together; None if no row asks for anything here."""
        concerned = [row for row in range(len(self.rows)) if self._concerns(row)]
        if not concerned:
            return None
        sequences = [row * copies + copy for row in concerned for copy in range(copies)]
        rows = [row for row in concerned for _ in range(copies)]
        index = torch.tensor(sequences, device=self.device)
        chains = [[link for link in self.rows[row].chain if link.reaches(self.layer)] for row in rows]
        steered = [(place, self._steerings(row), self.paddings[row]) for place, row in enumerate(rows)]
        return LayerPlan(
            index=None if len(sequences) == num_sequences else index,
            sequences=index,
            links=[self._parts(rows, chains, position) for position in range(max(map(len, chains)))],
            captures=[(place, self.buffers[row]) for place, row in enumerate(rows) if self._captures(row)],
            steered=[entry for entry in steered if entry[1]],
        )

    def _concerns(self, row: int) -> bool:
        chained = any(link.reaches(self.layer) for link in self.rows[row].chain)
        return chained or self._captures(row) or bool(self._steerings(row))

    def _captures(self, row: int) -> bool:
        return row in self.buffers and self.layer in self.buffers[row].layers

    def _steerings(self, row: int) -> list[Steering]:
        return [steering for steering in self.rows[row].steering if steering.reaches(self.layer)]

    def _parts(self, rows: list[int], chains: list[list[ChainLink]], position: int) -> list[ResidualTerm]:
        """The residuals at one place of the links: all trained ones together, all constant ones, each function."""
        here = [(place, chain[position]) for place, chain in enumerate(chains) if len(chain) > position]
        linked = [(place, link) for place, link in here if isinstance(link.residual, LinkedResidual)]
        constant = [(place, link) for place, link in here if isinstance(link.residual, SteeringVector)]
        parts: list[ResidualTerm] = []
        if linked:
            parts.append(self._linked_part(linked, len(rows)))
        if constant:
            parts.append(self._vector_part(constant, len(rows)))
        for place, link in here:
            if isinstance(link.residual, FunctionResidual):
                parts.append(self._function_part(place, rows[place], link, link.residual))
        return parts

    def _linked_part(self, linked: RouteSpan, num_rows: int) -> LinkedTerm:
        weights, scales = [], []
        for _, link in linked:
            assert isinstance(link.residual, LinkedResidual), "chosen by its kind"
            weights.append(link.residual.layers[self.layer].to(self.device))
            scales.append(link.weight * link.residual.config.scaling)
        return stack_linked(weights, scales, self._index(linked, num_rows), self.dtype)

    def _vector_part(self, constant: RouteSpan, num_rows: int) -> VectorTerm:
        vectors = []
        for _, link in constant:
            assert isinstance(link.residual, SteeringVector), "chosen by its kind"
            vectors.append(link.residual.vectors[self.layer].to(self.device, self.dtype) * link.weight)
        return VectorTerm(index=self._index(constant, num_rows), vectors=torch.stack(vectors).unsqueeze(1))

    def _function_part(self, place: int, row: int, link: ChainLink, residual: FunctionResidual) -> FunctionTerm:
        return FunctionTerm(
            index=torch.tensor([place], device=self.device),
            residual=residual,
            name=link.name,
            layer=self.layer,
            row=row,
            weight=link.weight,
            num_padding=self.paddings[row],
            failures=self.failures,
        )

    def _index(self, chosen: RouteSpan, num_rows: int) -> Tensor | None:
        if len(chosen) == num_rows:
            return None
        return torch.tensor([place for place, _ in chosen], device=self.device)
