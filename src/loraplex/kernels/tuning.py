"""Which linear product is the fastest for a weight on this machine: measured once, and kept in the cache folder."""

import hashlib
import json
import logging
import math
import platform
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, TypeVar

import torch

from loraplex.environment import cache_folder
from loraplex.errors import OutputError
from loraplex.json_files import read_json
from loraplex.kernels import library
from loraplex.kernels.packed_weight import has_fast_packed_product
from loraplex.kernels.product_times import TOKENS, LinearShape, Product, ProductTimes, measure_products
from loraplex.output_files import whole_file

logger = logging.getLogger(__name__)

ALL_TOKENS = 2**62  # any number of them
_MIN_SHARE = 0.8  # of a processor's time while something is measured
_MIN_VALUES = 2**16  # of a weight that is measured: the call itself takes longer than a smaller one's product
_MIN_SINGLE = 0.8  # of the speed with one token, which packing must leave: one and the same time varies by that

Result = TypeVar("Result")


@dataclass(frozen=True)
class ProductChoice:
    """What is the fastest for one weight."""

    is_packed: bool  # held in the order in which the compiled product reads it
    max_compiled_tokens: int  # up to which the compiled product runs; beyond it torch's. A packed weight has no other


def choose(times: ProductTimes) -> ProductChoice:
    """The choice that follows from measured times."""
    plain = _fastest(times, "compiled", "torch")
    packed = times.get("packed")
    if packed is not None and packed[0] * _MIN_SINGLE <= plain[0]:
        gains = [math.log(before / now) for before, now in zip(plain, packed, strict=True)]
        if sum(gains) > 0:
            return ProductChoice(is_packed=True, max_compiled_tokens=ALL_TOKENS)
    return ProductChoice(is_packed=False, max_compiled_tokens=_max_compiled(times))


def _max_compiled(times: ProductTimes) -> int:
    """The number of tokens up to which the compiled product is the fastest of a weight that isn't packed."""
    limit = 0
    for tokens, compiled, fastest in zip(TOKENS, times["compiled"], _fastest(times, "compiled", "torch"), strict=True):
        if compiled > fastest:
            break
        limit = tokens
    return ALL_TOKENS if limit == TOKENS[-1] else limit


def choices(shapes: Iterable[LinearShape]) -> dict[LinearShape, ProductChoice]:
    """The choice for every shape, measured now where it has not been before; without times, what usually is fastest."""
    wanted = set(shapes)
    times = tune(shape for shape in wanted if is_measured(shape))
    return {shape: choose(times[shape]) if shape in times else usual_choice(shape.dtype) for shape in wanted}


def unpacked_limit(shape: LinearShape) -> int:
    """Up to how many tokens the compiled product is the fastest of a weight that has to stay as it is."""
    times = tune([shape] if is_measured(shape) else [])
    return _max_compiled(times[shape]) if shape in times else ALL_TOKENS


def is_measured(shape: LinearShape) -> bool:
    """Whether it is large enough: with a small one, calls take longer than products."""
    return shape.out_features * shape.in_features >= _MIN_VALUES


def usual_choice(dtype: torch.dtype) -> ProductChoice:
    """What is chosen for weights of which there are no times."""
    is_packed = dtype == torch.bfloat16 and has_fast_packed_product()
    return ProductChoice(is_packed=is_packed, max_compiled_tokens=ALL_TOKENS)


def tune(shapes: Iterable[LinearShape], *, anew: bool = False) -> dict[LinearShape, ProductTimes]:
    """The times for every shape, from the cache folder, or (or `anew`) measured and kept there.

    Those that can't be measured, as others work on the machine, are left out.
    """
    wanted = sorted(set(shapes), key=str)
    with _lock:
        kept = _read(tuning_file())
        missing = [shape for shape in wanted if anew or str(shape) not in kept["times"]]
        if missing:
            logger.info("measuring %d linear products on this machine, once", len(missing))
            found, is_sound = undisturbed(lambda: {str(shape): measure_products(shape) for shape in missing})
            if is_sound:
                kept["times"] |= found
                _write(tuning_file(), kept)
    return {shape: kept["times"][str(shape)] for shape in wanted if str(shape) in kept["times"]}


def measured_once(name: str, measure: Callable[[], int], usual: int) -> int:
    """A number of this machine's, by name: from the cache folder, or measured; `usual` while others work on it."""
    with _lock:
        kept = _read(tuning_file())
        if name not in kept["numbers"]:
            number, is_sound = undisturbed(measure)
            if not is_sound:
                return usual
            kept["numbers"][name] = number
            _write(tuning_file(), kept)
        return kept["numbers"][name]


def forget_numbers() -> None:
    """Let every number be measured anew."""
    with _lock:
        kept = _read(tuning_file())
        if kept["numbers"]:
            kept["numbers"] = {}
            _write(tuning_file(), kept)


def undisturbed(measure: Callable[[], Result]) -> tuple[Result, bool]:
    """What `measure` gives, and whether this thread, which leads all others, had a processor for most of the time.

    All threads together are no measure: with many of them, the parts that one computes alone would look like a load.
    """
    clock, processor = time.perf_counter(), time.thread_time()
    result = measure()
    share = (time.thread_time() - processor) / (time.perf_counter() - clock)
    if share < _MIN_SHARE:
        logger.info("others work on this machine (%.0f %% of it were free): what was measured isn't used", 100 * share)
    return result, share >= _MIN_SHARE


def tuning_file() -> Path:
    """Where the times for this processor, torch, kernels and number of threads are kept."""
    machine = [processor(), torch.__version__, library.library_path().name, torch.get_num_threads()]
    key = hashlib.sha256(json.dumps(machine).encode()).hexdigest()[:16]
    return cache_folder() / "tuning" / f"{key}.json"


_lock = threading.Lock()


def _fastest(times: ProductTimes, *products: Product) -> list[float]:
    return [min(column) for column in zip(*(times[product] for product in products), strict=True)]


class _Kept(TypedDict):
    times: dict[str, ProductTimes]  # by shape
    numbers: dict[str, int]  # by name


def _read(file: Path) -> _Kept:
    """What is kept; nothing where it is damaged."""
    try:
        content = read_json(file)
        times = {shape: times for shape, times in content["times"].items() if _are_times(times)}
        return {"times": times, "numbers": {name: int(number) for name, number in content["numbers"].items()}}
    except FileNotFoundError:
        pass
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        logger.warning("%s can't be read, and is measured again: %s", file, error)
    return {"times": {}, "numbers": {}}


def _are_times(times: Mapping[Product, Sequence[float]]) -> bool:
    columns = list(times.values())
    return (
        "compiled" in times
        and "torch" in times
        and all(len(column) == len(TOKENS) and all(0 < seconds < math.inf for seconds in column) for column in columns)
    )


def _write(file: Path, kept: _Kept) -> None:
    machine = {"processor": processor(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    try:
        with whole_file(file, is_ours=lambda _: True) as temporary:
            temporary.write_text(json.dumps({**machine, **kept}, indent=1), encoding="utf-8")
    except OutputError as error:
        logger.warning("it is measured again in the next process: %s", error)


def processor() -> str:
    """The processor's name, and what it can do where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return " ".join(dict.fromkeys(line for line in lines if line.startswith(("model name", "flags", "Features"))))
