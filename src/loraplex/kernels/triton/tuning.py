"""Which block sizes a kernel runs with: timed on a GPU at the first use of a shape, and kept on disk.

The key is what a kernel's `key=` names (features, rank block, tokens of a tile) and the dtypes of its tensors; triton
adds its own version, the device, the kernel's source and the configurations, and keeps the result in its cache folder
(TRITON_CACHE_DIR, else ~/.triton/cache) as KERNEL.autotune.json.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import triton

from loraplex.kernels.triton.available import is_interpreted

# triton's autotuner keeps the call's arguments on itself: two threads must not launch through it at once.
LAUNCHING = threading.Lock()


def block_configs(name: str, sizes: Sequence[int]) -> list[Any]:
    """Configurations of a block size called `name`; one alone, which nothing has to time, in the interpreter."""
    if is_interpreted():
        return [triton.Config({name: max(sizes)}, num_warps=4, num_stages=1)]
    return [
        triton.Config({name: size}, num_warps=num_warps, num_stages=num_stages)
        for size in sizes
        for num_warps, num_stages in ((4, 2), (4, 4), (8, 3))
    ]


def tuned(name: str, sizes: Sequence[int], key: Sequence[str], *, changes: Sequence[str] = ()) -> Callable[..., Any]:
    """Tune a kernel's block size; `changes` are the tensors that a launch changes, given back after each trial."""
    return triton.autotune(
        configs=block_configs(name, sizes), key=list(key), restore_value=list(changes) or None, cache_results=True
    )
