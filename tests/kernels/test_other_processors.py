"""The compiled kernels for processors with fewer or other instructions than this one: they compile, and are right."""

import os
import platform
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

from loraplex.kernels.library import SOURCES
from tests.parts import require, skip_here

pytestmark = [pytest.mark.needs("compiler"), pytest.mark.slow]
X86 = platform.machine() in ("x86_64", "AMD64")
# No vector instructions but the oldest; AVX2; AVX-512 with bytes but without bfloat16; with both and without tiles.
PROCESSORS = ("x86-64", "x86-64-v3", "cascadelake", "cooperlake")
ROOT = Path(__file__).parents[2]
# Of every product and attention, against float64 and plain torch.
TESTS = ("test_kernels.py", "test_native_linear.py", "test_packed_weight.py", "test_int8_weight.py")
TESTS_OF_ENGINES = ("test_fused.py", "test_native_ops.py")


def compile_all(compiler: str, march: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Check all sources as one, without making code."""
    unit = folder / "all.cpp"
    unit.write_text("".join(f'#include "{path.name}"\n' for path in sorted(SOURCES.glob("*.cpp"))))
    # The headers of Python itself are not read: the library has no module of Python's.
    places = [str(SOURCES), *include_paths(), sysconfig.get_paths()["include"]]
    command = [compiler, "-fsyntax-only", "-fopenmp", "-std=c++20", f"-march={march}", str(unit)]
    command += [option for place in places for option in ("-isystem" if place != str(SOURCES) else "-I", place)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("march", PROCESSORS)
def test_sources_compile_for_other_processors(march: str, tmp_path: Path) -> None:
    if not X86:
        skip_here("an x86 processor")
    done = compile_all(os.environ.get("CXX", "c++"), march, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


def test_sources_compile_for_arm(tmp_path: Path) -> None:
    require("aarch64")
    done = compile_all("aarch64-linux-gnu-g++", "armv8.2-a", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("march", ["x86-64", "x86-64-v3"])
def test_kernels_without_newer_instructions_give_the_same(march: str, tmp_path: Path) -> None:
    """The plain path, which compilers vectorize as the processor has it: built, and tested as this machine's is."""
    if not X86:
        skip_here("an x86 processor")
    paths = [f"tests/kernels/{name}" for name in TESTS] + [f"tests/engine/{name}" for name in TESTS_OF_ENGINES]
    environment = os.environ | {"LORAPLEX_MARCH": march, "LORAPLEX_CACHE": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *paths]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
    assert list(tmp_path.glob("kernels/*.so")), "the kernels were not built anew"
