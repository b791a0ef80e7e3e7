"""How much faster are linear products with 8-bit weights than with bfloat16 ones?

    python benchmarks/int8_speed.py --threads 2

The linear modules of a Llama layer of 1.1B parameters, each on weights that no cache holds, in turns with the same
products on packed bfloat16 weights. Per column is what `weights="int8"` has in layers, groups of 128 in the output
layer, groups of 32 what a Q8_0 file has.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from common import console, print_table, save
from torch import Tensor

from loraplex.kernels.int8_weight import COLUMN, GROUP, Int8Weight
from loraplex.kernels.native import native_available
from loraplex.kernels.packed_weight import PackedWeight, packed_linear

SHAPES = [(2048, 2048), (256, 2048), (5632, 2048), (2048, 5632)]  # [out, in]
ROWS = (1, 8, 32)
KINDS: dict[str, Callable[[Tensor], PackedWeight]] = {
    "bfloat16": PackedWeight.of,
    "int8_column": lambda weight: Int8Weight.of(weight, COLUMN),
    "int8_group_128": lambda weight: Int8Weight.of(weight, GROUP),
    "int8_group_32": lambda weight: Int8Weight.of(weight, 32),
}
POOL_BYTES = 2**28  # of one kind's weights
ROUNDS = 60


def pool(kind: Callable[[Tensor], PackedWeight], shape: tuple[int, int]) -> list[PackedWeight]:
    """Copies of a weight, each in memory of its own."""
    first = kind(torch.randn(shape).bfloat16())
    count = max(2, POOL_BYTES // first.packed.nbytes)
    copies = [first.alias() for _ in range(count)]
    for copy in copies:
        copy.packed = first.packed.clone()
    return copies


def measure(shape: tuple[int, int], rows: int) -> dict[str, float]:
    """Microseconds of a call, by kind: the median of the faster half, as others may work on the machine.

    With one thread, of the processor's time, which doesn't run while others do.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    pools = {name: pool(kind, shape) for name, kind in KINDS.items()}
    x = torch.randn(rows, shape[1]).bfloat16()
    times: dict[str, list[float]] = {name: [] for name in KINDS}
    for i in range(ROUNDS):
        for name, weights in pools.items():
            start = clock()
            packed_linear(x, weights[i % len(weights)], None)
            times[name].append(clock() - start)
    return {name: statistics.median(sorted(own)[: ROUNDS // 2]) * 1e6 for name, own in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-save", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if not native_available():
        raise SystemExit("there is no compiled kernel")
    results = []
    with torch.inference_mode():
        for shape in SHAPES:
            for rows in ROWS:
                results.append({"out": shape[0], "in": shape[1], "rows": rows, "us": measure(shape, rows)})
                console.print(results[-1])
    table = [
        [f"{case['in']} to {case['out']}, {case['rows']} rows", *(f"{us:.0f}" for us in case["us"].values())]
        for case in results
    ]
    print_table("Microseconds a call", ["product", *KINDS], table)
    if not options.no_save:
        save("int8_speed", vars(options), results)


if __name__ == "__main__":
    main()
