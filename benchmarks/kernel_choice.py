"""Which kernel is fastest for how many tokens? Behind MAX_STACKED_TOKENS in kernels/dispatch.py.

    python benchmarks/kernel_choice.py

One block of SmolLM2-135M (7 linear modules), 8 adapters, a segment for each row; and the base product alone, also of a
larger model's width. Every call uses another copy of the weights, so that they come from memory as in a model. And the
attention of one new token a row over 500 keys, beside torch's as transformers calls it.
"""

import itertools
import statistics
import time

import torch
from common import print_table, save

from loraplex.adapters.store.prepared import PreparedAdapter
from loraplex.adapters.store.slot_weights import SlotWeights
from loraplex.adapters.store.slots import Slots
from loraplex.kernels.native import attend_rows_native, gated_linear_native, gated_lora_native, native_available
from loraplex.kernels.segmented import gated_lora_segmented
from loraplex.kernels.stacked import gated_lora_stacked
from loraplex.routing.plan import RoutingPlan
from loraplex.routing.segments import Segment
from loraplex.routing.weight_provider import SlotWeightProvider

SHAPES = [(576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576)]
RANKS = (8, 16, 4, 32, 8, 8, 8, 8)
WIDE = [(2048, 2048)]
COPIES = 20  # of a block: more bytes than the cache holds
HEADS, KV_HEADS, HEAD_DIM, KEYS = 9, 3, 64, 500


def make_plan(num_rows: int, tokens_per_row: int, dtype: torch.dtype) -> RoutingPlan:
    shapes = SHAPES * COPIES
    slots = Slots(len(RANKS), [str(i) for i in range(len(shapes))], torch.device("cpu"))
    for slot, rank in enumerate(RANKS):
        layers = {
            i: SlotWeights(
                lora_a=torch.randn(rank, num_in).to(dtype), lora_b=torch.randn(rank, num_out).to(dtype), scaling=1.0
            )
            for i, (num_in, num_out) in enumerate(shapes)
        }
        slots.put(slot, PreparedAdapter(layers=layers))
    segments = [Segment(r * tokens_per_row, (r + 1) * tokens_per_row, r % len(RANKS)) for r in range(num_rows)]
    return RoutingPlan(segments, num_rows * tokens_per_row, SlotWeightProvider(slots))


def median_us(calls) -> float:
    """Median time of one call, in microseconds; `calls` does something else (other weights) each time."""
    times = []
    for call in calls:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times[len(times) // 5 :]) * 1e6


def adapters_alone(dtype: torch.dtype, tokens_per_row: int) -> dict[str, float]:
    """Each kernel's time for one module, averaged over a block's seven."""
    plan = make_plan(len(RANKS), tokens_per_row, dtype)
    x = {n: torch.randn(plan.num_tokens, n).to(dtype) for n in {shape[0] for shape in SHAPES}}
    y = {n: torch.zeros(plan.num_tokens, n).to(dtype) for n in {shape[1] for shape in SHAPES}}

    def run(kernel: str, module: int) -> None:
        num_in, num_out = SHAPES[module % len(SHAPES)]
        if kernel == "native":
            gated_lora_native(y[num_out], x[num_in], *plan.table, module, plan.rows, plan.gates.of_module(module))
        elif kernel == "stacked":
            gated_lora_stacked(y[num_out], x[num_in], plan.stack(module))
        else:
            gated_lora_segmented(y[num_out], x[num_in], plan.lora_segments(module))

    modules = range(len(SHAPES) * COPIES)
    for module in modules:
        plan.stack(module)  # made once in a generation
    return {
        kernel: median_us([lambda k=kernel, m=module: run(k, m) for module in modules])
        for kernel in ("native", "stacked", "segmented")
    }


def base_product(dtype: torch.dtype, shapes: list[tuple[int, int]], num_rows: int) -> dict[str, float]:
    """torch's product against the compiled one."""
    plan = make_plan(1, 1, dtype)
    weights = [torch.randn(num_out, num_in).to(dtype) for num_in, num_out in shapes * COPIES]
    x = {n: torch.randn(num_rows, n).to(dtype) for n in {shape[0] for shape in shapes}}
    torch_calls = [lambda w=w: torch.nn.functional.linear(x[w.shape[1]], w) for w in weights]
    native_calls = [
        lambda w=w: gated_linear_native(x[w.shape[1]], w, None, *plan.table, 0, plan.rows[:0], plan.gates.of_module(0))
        for w in weights
    ]
    return {"torch": median_us(torch_calls), "native": median_us(native_calls)}


def attention(dtype: torch.dtype, num_rows: int) -> dict[str, float]:
    """torch's attention against the compiled one."""
    keys = [torch.randn(num_rows, KV_HEADS, KEYS, HEAD_DIM).to(dtype) for _ in range(COPIES)]
    query = torch.randn(num_rows, HEADS, 1, HEAD_DIM).to(dtype)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    return {
        "torch": median_us([lambda k=k: sdpa(query, k, k, enable_gqa=True) for k in keys]),
        "native": median_us([lambda k=k: attend_rows_native(query[:, :, 0], k, k, None, 0.125) for k in keys]),
    }


@torch.no_grad()
def main() -> None:
    if not native_available():
        raise SystemExit("The compiled kernels can't run here, and these measurements are about them.")
    dtypes = (torch.bfloat16, torch.float32)
    adapters = [
        {"dtype": str(dtype), "tokens_per_row": n, **adapters_alone(dtype, n)}
        for dtype, n in itertools.product(dtypes, (1, 2, 4, 8, 16, 32))
    ]
    products, wide = (
        [
            {"dtype": str(dtype), "rows": n, **base_product(dtype, shapes, n)}
            for dtype, n in itertools.product(dtypes, (1, 2, 4, 8, 16, 32, 64, 128, 256))
        ]
        for shapes in (SHAPES, WIDE)
    )
    attentions = [
        {"dtype": str(dtype), "rows": n, **attention(dtype, n)} for dtype, n in itertools.product(dtypes, (1, 2, 8))
    ]
    for title, figures, key in (
        ("adapters of one module, 8 rows: microseconds a call", adapters, "tokens_per_row"),
        ("base product of one module: microseconds a call", products, "rows"),
        (f"base product of {WIDE[0][0]} by {WIDE[0][1]}: microseconds a call", wide, "rows"),
        (f"attention of one new token a row over {KEYS} keys: microseconds a call", attentions, "rows"),
    ):
        columns = [column for column in figures[0] if column not in ("dtype", key)]
        rows = [[f["dtype"], str(f[key]), *(f"{f[c]:.0f}" for c in columns)] for f in figures]
        print_table(title, ["dtype", key, *columns], rows)
    results = {"adapters": adapters, "base_product": products, "wide_product": wide, "attention": attentions}
    save("kernel_choice", {"shapes": SHAPES, "wide": WIDE, "ranks": RANKS, "keys": KEYS}, results)


if __name__ == "__main__":
    main()
