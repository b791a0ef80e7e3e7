"""What a test may lack, told in one place.

A part can be installed on any machine. Without it its tests are skipped, or fail with LORAPLEX_REQUIRE_ALL=1, as CI
runs them. What no package brings, such as a CUDA device, belongs to the machine, and stays a skip.
"""

import importlib.util
import os
import shutil
from collections.abc import Callable
from functools import cache
from typing import NamedTuple, NoReturn

import pytest

REQUIRE_ALL = "LORAPLEX_REQUIRE_ALL"
NOT_THIS_MACHINE = "not on this machine: "
_BROWSERS = ("chromium", "chromium-browser", "google-chrome")


class Part(NamedTuple):
    is_here: Callable[[], bool]
    how: str  # to get it


def find_browser() -> str | None:
    """The path of the Chromium that LORAPLEX_CHROMIUM names, or that the system has."""
    return os.environ.get("LORAPLEX_CHROMIUM") or next(filter(None, map(shutil.which, _BROWSERS)), None)


def _has_compiled_kernels() -> bool:
    from loraplex.kernels.native import native_available

    return native_available()


def _has_smollm2() -> bool:
    from loraplex.errors import BaseModelError
    from loraplex.models.checkpoints.smollm2 import convert_smollm2

    try:
        return convert_smollm2().is_dir()
    except BaseModelError:
        return False


def _package(name: str, how: str) -> Part:
    return Part(lambda: importlib.util.find_spec(name) is not None, how)


PARTS = {
    "aarch64": Part(lambda: shutil.which("aarch64-linux-gnu-g++") is not None, "apt-get install g++-aarch64-linux-gnu"),
    "bitsandbytes": _package("bitsandbytes", "make setup"),
    "chromium": Part(lambda: find_browser() is not None, "apt-get install chromium, or name one in LORAPLEX_CHROMIUM"),
    "compiler": Part(_has_compiled_kernels, "the compiled kernels can't be built here: apt-get install g++"),
    "compressed_tensors": _package("compressed_tensors", "make setup"),
    "hqq": _package("hqq", "make test-quantized"),
    "llguidance": _package("llguidance", "make setup"),
    "lm_eval": _package("lm_eval", "make setup-extras"),
    "mlflow": _package("mlflow", "make setup-extras"),
    "mkdocs": _package("mkdocs", "make setup"),
    "openssl": Part(lambda: shutil.which("openssl") is not None, "apt-get install openssl"),
    "ray": _package("ray", "make setup-extras"),
    "smollm2": Part(_has_smollm2, "make setup"),
    "tensorboard": _package("tensorboard", "make setup-extras"),
    "torchao": _package("torchao", "make test-quantized"),
    "triton": _package("triton", "make setup"),
    "wandb": _package("wandb", "make setup-extras"),
}
_is_here = cache(lambda part: PARTS[part].is_here())


def require(part: str) -> None:
    """Skip the test, or the module that calls this, where a part of PARTS is missing; as the mark `needs` does."""
    if not _is_here(part):
        pytest.skip(f"needs {part}: {PARTS[part].how}", allow_module_level=True)


def skip_here(what: str) -> NoReturn:
    """Skip a test of what this machine, or this run, can't have and no package brings."""
    pytest.skip(NOT_THIS_MACHINE + what, allow_module_level=True)


def is_failure(skip_reason: str) -> bool:
    """Whether a skip must fail: all parts are required, and the machine is not the reason."""
    return os.environ.get(REQUIRE_ALL) == "1" and NOT_THIS_MACHINE not in skip_reason
