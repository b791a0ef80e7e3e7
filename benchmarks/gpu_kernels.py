"""The Triton kernels by themselves: errors against float64, and times beside what else computes the same."""

import importlib.util
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from gpu_timing import Figure, Timer
from torch import Tensor

from loraplex.kernels.triton.expand import expand
from loraplex.kernels.triton.gated import gated_lora_triton
from loraplex.kernels.triton.shrink import shrink
from loraplex.kernels.triton.work import LARGE_TILE_TOKENS, SMALL_TILE_TOKENS, SlotFactors, make_work

_BARS = {torch.bfloat16: 1e-2, torch.float32: 1e-3}


@dataclass(frozen=True, kw_only=True)
class Slots:
    """Random adapters of one module, stacked for those who want that and listed in a table for us."""

    lora_a: list[Tensor]  # [rank, in]
    lora_b: list[Tensor]  # [rank, out]

    def factors(self) -> SlotFactors:
        cells = [[[a.data_ptr(), b.data_ptr(), len(a)]] for a, b in zip(self.lora_a, self.lora_b, strict=True)]
        device = self.lora_a[0].device
        table = torch.tensor(cells, dtype=torch.int64, device=device)
        ones = torch.ones(len(cells), 1, device=device)
        return SlotFactors(table, ones, max(map(len, self.lora_a)), device.type != "cpu")


def random_slots(ranks: Sequence[int], num_in: int, num_out: int, dtype: torch.dtype, device: torch.device) -> Slots:
    return Slots(
        lora_a=[(torch.randn(r, num_in, device=device) * num_in**-0.5).to(dtype) for r in ranks],
        lora_b=[(torch.randn(r, num_out, device=device) * r**-0.5).to(dtype) for r in ranks],
    )


def errors(timer: Timer, num_cases: int, largest: int) -> list[Figure]:
    """The worst relative error over random segments: ranks 1 to 128, dense and one-hot gates, empty and odd ones."""
    figures = []
    for dtype, bar in _BARS.items():
        draw = random.Random(0)
        worst = max(_error_of_one(timer.device, dtype, draw, largest) for _ in range(num_cases))
        name = str(dtype).removeprefix("torch.")
        figures.append(
            Figure(shape="random", what=f"error, {name}", value=worst, unit="", bar=f"<= {bar:g}", holds=worst <= bar)
        )
    return figures


def _error_of_one(device: torch.device, dtype: torch.dtype, draw: random.Random, largest: int) -> float:
    num_in, num_out, num_tokens = (draw.randint(1, largest) for _ in range(3))
    slots = random_slots([draw.choice((1, 2, 7, 16, 33, 64, 128)) for _ in range(3)], num_in, num_out, dtype, device)
    rows, first = [], 0
    for slot in range(3):
        start, stop = sorted(draw.randint(0, num_tokens) for _ in range(2))
        rows.append((start, stop, slot, first))
        first += stop - start
    gates = torch.randn(first, device=device)
    if draw.random() < 0.5:
        gates = (gates > 0).float()
    x, y = torch.randn(num_tokens, num_in, device=device).to(dtype), torch.randn(num_tokens, num_out, device=device)
    y = y.to(dtype)
    expected = y.double()
    for start, stop, slot, row in rows:
        hidden = x[start:stop].double() @ slots.lora_a[slot].double().t()
        expected[start:stop] += (hidden * gates[row : row + stop - start, None].double()) @ slots.lora_b[slot].double()
    work = make_work(rows, draw.choice((SMALL_TILE_TOKENS, LARGE_TILE_TOKENS)), device)
    gated_lora_triton([y], x, slots.factors(), [0], work, gates)
    return float((y.double() - expected).norm() / expected.norm())


def copy_bandwidth(timer: Timer, num_bytes: int) -> float:
    """Bytes read and written in a second by a large copy."""
    source = torch.empty(num_bytes, dtype=torch.uint8, device=timer.device)
    target = torch.empty_like(source)
    return 2 * num_bytes / timer.median(lambda: target.copy_(source))


def decode_kernels(timer: Timer, *, rows: int, rank: int, hidden: int, copied_bytes: int) -> list[Figure]:
    """Shrink and expand of one token a row, each row with an adapter of its own, beside peers in the same run."""
    device, dtype = timer.device, torch.bfloat16
    slots = random_slots([rank] * rows, hidden, hidden, dtype, device)
    stacked_a, stacked_b = torch.stack(slots.lora_a), torch.stack(slots.lora_b)
    factors = slots.factors()
    segments = [(i, i + 1, i, i) for i in range(rows)]
    work, gates = make_work(segments, SMALL_TILE_TOKENS, device), torch.ones(rows, device=device)
    x, y = torch.randn(rows, hidden, device=device).to(dtype), torch.zeros(rows, hidden, device=device, dtype=dtype)
    order = torch.randperm(rows, device=device)
    states = shrink(x, factors.table, factors.scalings, [0], work, gates, rank, aligned=factors.aligned)

    def both() -> None:
        gated_lora_triton([y], x, factors, [0], work, gates)

    def gathered() -> None:
        a, b = stacked_a[order], stacked_b[order]
        y.unsqueeze(1).add_(torch.bmm(torch.bmm(x.unsqueeze(1), a.transpose(1, 2)), b))

    def shrunk() -> None:
        shrink(x, factors.table, factors.scalings, [0], work, gates, rank, aligned=factors.aligned, hidden=states)

    def expanded() -> None:
        expand([y], states, factors.table, [0], work, rank, aligned=factors.aligned)

    sides: dict[str, Callable[[], object]] = {"shrink": shrunk, "expand": expanded, "both": both, "bmm": gathered}
    seconds = {}
    for name, run in sides.items():
        seconds[name] = timer.median(timer.captured(run), prepare=x.normal_)
    seconds |= polylora_seconds(timer, x, y, stacked_a, stacked_b, order)
    bandwidth = copy_bandwidth(timer, copied_bytes)
    shape = f"{rows} rows, rank {rank}, hidden {hidden}"
    return _decode_figures(timer, shape, seconds, bandwidth, num_bytes=stacked_a.numel() * dtype.itemsize)


def _decode_figures(
    timer: Timer, shape: str, seconds: dict[str, float], bandwidth: float, *, num_bytes: int
) -> list[Figure]:
    figures = [Figure(shape=shape, what="copy bandwidth", value=bandwidth / 1e9, unit="GB/s")]
    for name in ("shrink", "expand"):
        share = num_bytes / seconds[name] / bandwidth
        bar = ">= 60 % of a copy"
        holds = share >= 0.6 if timer.is_gpu else None
        figures.append(
            Figure(
                shape=shape, what=f"{name}, of the copy bandwidth", value=100 * share, unit="%", bar=bar, holds=holds
            )
        )
    for name, taken in seconds.items():
        figures.append(Figure(shape=shape, what=f"{name}, time", value=taken * 1e6, unit="us"))
    ratio = seconds["bmm"] / seconds["both"]
    holds = ratio >= 1.5 if timer.is_gpu else None
    figures.append(
        Figure(shape=shape, what="bmm over gathered weights / ours", value=ratio, unit="x", bar=">= 1.5x", holds=holds)
    )
    if "polylora" in seconds:
        ratio = seconds["polylora"] / seconds["both"]
        figures.append(Figure(shape=shape, what="polylora / ours", value=ratio, unit="x"))
    return figures


def polylora_seconds(
    timer: Timer, x: Tensor, y: Tensor, lora_a: Tensor, lora_b: Tensor, order: Tensor
) -> dict[str, float]:
    """The kernels of the package polylora on the same work, if it is installed (pip install --no-deps polylora).

    Its second kernel asks the device for the number of its tiles, so it can't be captured.
    """
    if importlib.util.find_spec("polylora") is None:
        return {}
    from polylora.sgmv import sgmv_lora_a_fwd, sgmv_lora_b_fwd

    rows, rank = len(x), lora_a.shape[1]
    weights_a = lora_a.transpose(1, 2).contiguous()  # [adapters, in, rank]
    lengths, indices = torch.ones(rows, dtype=torch.int32, device=x.device), order.to(torch.int32)
    ranks = torch.full((rows,), rank, dtype=torch.int32, device=x.device)
    ones = torch.ones(rows, device=x.device)

    def run() -> None:
        states = sgmv_lora_a_fwd(x.unsqueeze(1), weights_a, lengths, indices, ranks)
        sgmv_lora_b_fwd(states, lora_b, lengths, indices, ranks, ones, y.unsqueeze(1))

    return {"polylora": timer.median(run, prepare=x.normal_)}
