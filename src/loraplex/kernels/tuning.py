"""Which linear product is the fastest for a weight on this machine: measured once, and kept in the cache folder."""

import hashlib
import json
import logging
import math
import platform
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from loraplex.environment import cache_folder
from loraplex.errors import OutputError
from loraplex.json_files import read_json
from loraplex.kernels import library
from loraplex.kernels.packed_weight import has_fast_packed_product
from loraplex.kernels.product_times import TOKENS, LinearShape, Product, ProductTimes, measure_products
from loraplex.output_files import whole_file

logger = logging.getLogger(__name__)

_MIN_SHARE = 0.8  # of the processors' time while it is measured
ALL_TOKENS = 2**62  # any number of them
_MIN_VALUES = 2**16  # of a weight that is measured: the call itself takes longer than a smaller one's product
_MIN_SINGLE = 0.95  # of the speed with one token, which packing must not cost more of


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
    limit = 0
    for tokens, compiled, fastest in zip(TOKENS, times["compiled"], plain, strict=True):
        if compiled > fastest:
            break
        limit = tokens
    return ProductChoice(is_packed=False, max_compiled_tokens=ALL_TOKENS if limit == TOKENS[-1] else limit)


def choices(shapes: Iterable[LinearShape]) -> dict[LinearShape, ProductChoice]:
    """The choice for every shape, measured now where it has not been before."""
    wanted = set(shapes)
    times = tune(shape for shape in wanted if _is_measured(shape))
    small = {shape: _choice_of_small(shape.dtype) for shape in wanted - times.keys()}
    return small | {shape: choose(of_shape) for shape, of_shape in times.items()}


def tune(shapes: Iterable[LinearShape], *, anew: bool = False) -> dict[LinearShape, ProductTimes]:
    """The times for every shape, from the cache folder or (or `anew`) measured and kept there."""
    wanted = sorted(set(shapes), key=str)
    with _lock:
        kept = _read(tuning_file())
        missing = [shape for shape in wanted if anew or str(shape) not in kept]
        if missing:
            logger.info("measuring %d linear products on this machine, once", len(missing))
            with _watching_processors() as were_ours:
                kept |= {str(shape): measure_products(shape) for shape in missing}
            if were_ours():
                _write(tuning_file(), kept)
    return {shape: kept[str(shape)] for shape in wanted}


def tuning_file() -> Path:
    """Where the times for this processor, torch, kernels and number of threads are kept."""
    machine = [_processor(), torch.__version__, library.library_path().name, torch.get_num_threads()]
    key = hashlib.sha256(json.dumps(machine).encode()).hexdigest()[:16]
    return cache_folder() / "tuning" / f"{key}.json"


_lock = threading.Lock()


def _fastest(times: ProductTimes, *products: Product) -> list[float]:
    return [min(column) for column in zip(*(times[product] for product in products), strict=True)]


def _is_measured(shape: LinearShape) -> bool:
    return shape.out_features * shape.in_features >= _MIN_VALUES


def _choice_of_small(dtype: torch.dtype) -> ProductChoice:
    return ProductChoice(
        is_packed=dtype == torch.bfloat16 and has_fast_packed_product(), max_compiled_tokens=ALL_TOKENS
    )


@contextmanager
def _watching_processors() -> Iterator[Callable[[], bool]]:
    """Yield what tells, after the block, whether its threads had their processors to themselves for most of the time.

    Times that weren't taken so are used, but not kept for other processes.
    """
    clock, processors = time.perf_counter(), time.process_time()
    yield lambda: done
    share = (time.process_time() - processors) / (torch.get_num_threads() * (time.perf_counter() - clock))
    done = share >= _MIN_SHARE
    if not done:
        logger.info("others work on this machine (%.0f %% of it were free): not kept", 100 * share)


def _read(file: Path) -> dict[str, ProductTimes]:
    """What is kept; nothing where it is damaged."""
    try:
        kept = read_json(file)["times"]
        return {shape: times for shape, times in kept.items() if _are_times(times)}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        logger.warning("%s can't be read, and is measured again: %s", file, error)
        return {}


def _are_times(times: Mapping[Product, Sequence[float]]) -> bool:
    return "compiled" in times and "torch" in times and all(len(column) == len(TOKENS) for column in times.values())


def _write(file: Path, kept: Mapping[str, ProductTimes]) -> None:
    content = {"processor": _processor(), "torch": torch.__version__, "threads": torch.get_num_threads(), "times": kept}
    try:
        with whole_file(file, is_ours=lambda _: True) as temporary:
            temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
    except OutputError as error:
        logger.warning("the times are measured again in the next process: %s", error)


def _processor() -> str:
    """The processor's name, and what it can do where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return " ".join(dict.fromkeys(line for line in lines if line.startswith(("model name", "flags", "Features"))))
