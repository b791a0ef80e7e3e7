"""The gate as one opaque operator of torch: what multiplies a token's values in rank space."""

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("loraplex", "FRAGMENT")
_SCHEMA = "gate_ranks_(Tensor(a!) x, Tensor gates, Tensor columns, Tensor slots, int first_module) -> ()"


def gate_ranks_(
    x: Tensor,  # [slices, tokens, rank]  changed in place
    gates: Tensor,  # [modules, most tokens, gate columns]
    columns: Tensor,  # [slots + 1, rank]  int64: the gate column of each rank column
    slots: Tensor,  # [most tokens]  int64: the slot of each token; the last row of `columns` for none
    first_module: int,  # the module of x[0]; the slices follow
) -> None:
    """Multiply x[s, t, r] by gates[first_module + s, t, columns[slots[t], r]].

    All tensors but x are static buffers: a compiled or captured graph reads what is in them when it runs. There is no
    branch on their contents, so a graph that was captured without mixtures is right with them.
    """
    num_slices, num_tokens, _ = x.shape
    chosen = columns[slots[:num_tokens]].expand(num_slices, -1, -1)  # [slices, tokens, rank]
    x.mul_(gates[first_module : first_module + num_slices, :num_tokens].gather(2, chosen))


def _fake(x: Tensor, gates: Tensor, columns: Tensor, slots: Tensor, first_module: int) -> None:
    return None


_LIBRARY.define(_SCHEMA)
_LIBRARY.impl("gate_ranks_", gate_ranks_, "CompositeExplicitAutograd")
torch.library.register_fake("loraplex::gate_ranks_", _fake, lib=_LIBRARY)
