"""The compiled CPU kernel: built once with the machine's C++ compiler, cached, and never required."""

import hashlib
import logging
import os
import platform
import shutil
import sys
import threading
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

_SOURCE = Path(__file__).parent / "csrc" / "gated_lora.cpp"
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-std=c++20")
_BUILD_LOCK = threading.Lock()
SUPPORTED_DTYPES = (torch.float32, torch.bfloat16)


def native_available() -> bool:
    """Whether the compiled kernel can run here; the first call builds it (some 10 s) or loads it from the cache.

    LORAPLEX_NATIVE=0 turns it off. Without it the torch kernels do the same work.
    """
    with _BUILD_LOCK:
        return _load()


def gated_lora_native(
    y: Tensor,  # [.., out]  contiguous, changed in place
    x: Tensor,  # [.., in]  contiguous
    table: Tensor,  # [slots, modules, 3]  int64: addresses of lora_a and lora_b, rank
    scalings: Tensor,  # [slots, modules]  float32
    module: int,
    segments: Tensor,  # [n, 4]  int64: start, stop, slot, first gate
    gates: Tensor,  # [..]  float32
) -> Tensor:
    """Add every segment's adapter: y[t] += gates[t] * scaling * lora_b^T lora_a x[t]."""
    torch.ops.loraplex.gated_lora_(y, x, table, scalings, module, segments, gates)
    return y


@cache
def _load() -> bool:
    if os.environ.get("LORAPLEX_NATIVE") == "0":
        logger.info("the compiled CPU kernel is turned off by LORAPLEX_NATIVE=0; torch kernels are used")
        return False
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        logger.warning("no C++ compiler %r: torch kernels are used, which decode more slowly", compiler)
        return False
    try:
        _build()
    except Exception as error:  # a broken toolchain fails in many ways, none of which may stop the model
        logger.warning("the CPU kernel did not build, torch kernels are used instead: %s", error)
        return False
    return True


def _build() -> None:
    from torch.utils.cpp_extension import load  # imports setuptools: only when something is built

    source = _SOURCE.read_bytes()
    # -march=native: a cache that several machines share must not hand one machine another's instructions.
    key = hashlib.sha256(
        b"\0".join([source, " ".join(_FLAGS).encode(), torch.__version__.encode(), _cpu_features().encode()])
    ).hexdigest()[:16]
    folder = _cache_folder() / "kernels" / key
    folder.mkdir(parents=True, exist_ok=True)
    _put_ninja_on_path()
    load(
        name=f"loraplex_cpu_{key}",
        sources=[str(_SOURCE)],
        extra_cflags=list(_FLAGS),
        build_directory=str(folder),
        is_python_module=False,
    )


def _cache_folder() -> Path:
    return Path(os.environ.get("LORAPLEX_CACHE", Path.home() / ".cache" / "loraplex"))


def _cpu_features() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.machine() + platform.processor()
    lines = cpuinfo.read_text(errors="replace").splitlines()
    return platform.machine() + next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _put_ninja_on_path() -> None:
    """The package `ninja` puts its program beside the interpreter, which is not on PATH outside an activated venv."""
    if shutil.which("ninja") is None:
        os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
