"""What each attention layer does for rows that ask for something, kept from pass to pass."""

from collections.abc import Sequence

import torch
from torch import Tensor

from loraplex.errors import AdapterError
from loraplex.residual.cache import Key
from loraplex.residual.capture import CaptureBuffer
from loraplex.residual.modules import LinkedResidual
from loraplex.residual.plan import LayerPlan, LayerPlanner
from loraplex.residual.rows import RowAttention


class RowPlans:
    """What each layer does for some rows; decoding has the same rows pass after pass."""

    def __init__(self, rows: Sequence[RowAttention], buffer: CaptureBuffer | None) -> None:
        self.rows = tuple(rows)
        self.failures: dict[int, AdapterError] = {}  # by row, of functions; the row's request ends with it
        self._buffers = {} if buffer is None else {0: buffer}  # a row that captures stands alone
        self._plans: dict[int, LayerPlan | None] = {}
        self._ranks: dict[Key, Tensor] = {}

    def plan(self, layer: int, query: Tensor) -> LayerPlan | None:
        """What to do at a layer; None is nothing."""
        if layer not in self._plans:
            planner = LayerPlanner(
                layer=layer,
                rows=self.rows,
                paddings=[0] * len(self.rows),
                buffers=self._buffers,
                failures=self.failures,
                dtype=torch.promote_types(query.dtype, torch.float32),
                device=query.device,
            )
            self._plans[layer] = planner.build(1, len(self.rows))
        return self._plans[layer]

    def ranks(self, key: Key, device: torch.device) -> Tensor:  # [rows]
        """The rank of each row's residual at a layer and place in the link; 0 where there is none or it has no rank."""
        if key not in self._ranks:
            self._ranks[key] = torch.tensor([_rank(row, *key) for row in self.rows], device=device)
        return self._ranks[key]


def _rank(row: RowAttention, layer: int, place: int) -> int:
    here = [link.residual for link in row.chain if link.reaches(layer)]
    residual = here[place] if place < len(here) else None
    return residual.layers[layer].rank if isinstance(residual, LinkedResidual) else 0
