"""The gated LoRA layer of frozen adapters: two launches for all adapters of all projections that share their input.

Routers of mixtures are a third.
"""

from collections.abc import Sequence

from torch import Tensor

from loraplex.kernels.triton.expand import expand
from loraplex.kernels.triton.route import route
from loraplex.kernels.triton.shrink import MAX_PROJECTIONS, shrink
from loraplex.kernels.triton.work import RouteWork, SlotFactors, WorkList


def gated_lora_triton(
    ys: Sequence[Tensor],  # [tokens, out] each, contiguous, of x's dtype or float32, changed in place
    x: Tensor,  # [tokens, in]  contiguous, shared by all
    factors: SlotFactors,
    modules: Sequence[int],  # of the table, one for each y
    work: WorkList,
    gates: Tensor,  # [rows] or [modules, rows]  float32, without LoRA scaling; 1 for experts of routers
    routes: RouteWork | None = None,
) -> None:
    """Add every token's adapters: y_p[t] += gates[row] * scaling * lora_b_p^T lora_a_p x[t], over t's rows.

    With `routes` a launch between them gates the experts of mixtures whose routers read x.
    """
    for first in range(0, len(modules), MAX_PROJECTIONS):
        chosen = modules[first : first + MAX_PROJECTIONS]
        hidden = shrink(
            x, factors.table, factors.scalings, chosen, work, gates, factors.max_rank, aligned=factors.aligned
        )
        if routes is not None:
            route(x, hidden, factors.table, chosen, routes, factors.max_rank, work.block_tokens)
        expand(
            ys[first : first + MAX_PROJECTIONS],
            hidden,
            factors.table,
            chosen,
            work,
            factors.max_rank,
            aligned=factors.aligned,
            like=x,
        )
