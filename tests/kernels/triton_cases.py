"""Random work for the Triton kernels, on any device, and what it gives in float64."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loraplex.kernels.segments import LoraSegment
from tests.kernels.rounding import output_sizes, worst_excess

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Span = tuple[int, int, int]  # start, stop, slot


@dataclass(frozen=True, kw_only=True)
class Case:
    """A packed batch of some projections that share x, and the slots that its segments go through."""

    x: Tensor  # [tokens, in]
    ys: list[Tensor]  # of each projection [tokens, out]
    lora_a: list[list[Tensor]]  # of each slot and projection [rank, in]; rank 0: not adapted
    lora_b: list[list[Tensor]]  # [rank, out]
    scalings: Tensor  # [slots, projections]
    spans: list[Span]
    gates: Tensor  # [rows], or [projections, rows]

    @property
    def rows(self) -> list[tuple[int, int, int, int]]:
        """The spans with their first rows in rank space."""
        made, first = [], 0
        for start, stop, slot in self.spans:
            made.append((start, stop, slot, first))
            first += stop - start
        return made

    def table(self) -> Tensor:  # [slots, projections, 3]
        """Where the factors lie, as the kernels read it."""
        cells = [
            [[a.data_ptr(), b.data_ptr(), len(a)] if len(a) else [0, 0, 0] for a, b in zip(of_a, of_b, strict=True)]
            for of_a, of_b in zip(self.lora_a, self.lora_b, strict=True)
        ]
        return torch.tensor(cells, dtype=torch.int64, device=self.x.device)

    @property
    def max_rank(self) -> int:
        return max(len(a) for of_slot in self.lora_a for a in of_slot)

    def gates_of(self, projection: int, first: int, num_tokens: int) -> Tensor:
        gates = self.gates if self.gates.ndim == 1 else self.gates[projection]
        return gates[first : first + num_tokens]

    def expected(self) -> list[Tensor]:
        """The outputs in float64, one span after the other."""
        totals = [y.double().clone() for y in self.ys]
        for start, stop, slot, first in self.rows:
            for p, total in enumerate(totals):
                a, b = self.lora_a[slot][p].double(), self.lora_b[slot][p].double()
                gates = self.gates_of(p, first, stop - start).double() * self.scalings[slot, p].double()
                total[start:stop] += (self.x[start:stop].double() @ a.t() * gates.unsqueeze(1)) @ b
        return totals

    def excess(self, outs: Sequence[Tensor]) -> float:
        """The largest error of the outputs, in parts of what rounding explains."""
        sizes = [output_sizes(y, self.x, of_one) for y, of_one in zip(self.ys, self.segments(), strict=True)]
        return worst_excess(outs, self.expected(), sizes)

    def segments(self) -> list[list[LoraSegment]]:
        """The same for the kernels of training: of each projection, LoRA scaling in the gates."""
        return [
            [
                LoraSegment(
                    start,
                    stop,
                    self.lora_a[slot][p],
                    self.lora_b[slot][p],
                    self.gates_of(p, first, stop - start) * self.scalings[slot, p],
                )
                for start, stop, slot, first in self.rows
            ]
            for p in range(len(self.ys))
        ]


def make_case(
    ranks: Sequence[int | Sequence[int]],  # of each slot, for all projections or for each
    spans: Sequence[Span],
    *,
    num_tokens: int,
    num_in: int,
    outs: Sequence[int],
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    gates: str = "dense",  # "dense", "one-hot", or "of modules" (dense, others for each projection)
    seed: int = 0,
) -> Case:
    """Random tensors whose adapters' shares are about as large as the base output."""
    draw = torch.Generator().manual_seed(seed)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=draw) * scale).to(device, dtype)

    by_slot = [[rank] * len(outs) if isinstance(rank, int) else list(rank) for rank in ranks]
    num_rows = sum(max(0, stop - start) for start, stop, _ in spans)
    shape = (len(outs), num_rows) if gates == "of modules" else (num_rows,)
    values = torch.randn(shape, generator=draw)
    if gates == "one-hot":
        values = (torch.rand(shape, generator=draw) < 0.5).float()
    return Case(
        x=random(num_tokens, num_in),
        ys=[random(num_tokens, out) for out in outs],
        lora_a=[[random(rank, num_in, scale=num_in**-0.5) for rank in of_slot] for of_slot in by_slot],
        lora_b=[
            [random(rank, out, scale=max(rank, 1) ** -0.5) for rank, out in zip(of_slot, outs, strict=True)]
            for of_slot in by_slot
        ],
        scalings=(0.5 + torch.rand(len(by_slot), len(outs), generator=draw)).to(device),
        spans=list(spans),
        gates=values.to(device),
    )
