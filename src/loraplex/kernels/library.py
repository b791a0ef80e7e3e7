"""The compiled library in the cache: built in a process that is ended when it hangs, sealed, loaded only if whole."""

import hashlib
import json
import os
import platform
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import torch

from loraplex.environment import cache_folder, switch, variable
from loraplex.output_files import flush_to_disk

SOURCES = Path(__file__).parent / "csrc"
FLAGS = ("-O3", "-fopenmp", "-std=c++20")
# With LORAPLEX_SANITIZE=1, in a process that has preloaded the sanitizers' libraries (`make test-sanitize`).
SANITIZERS = ("-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
BUILD_TIMEOUT_S = 600.0  # some 10 s are usual

_NAME = "loraplex_kernels"
_SEAL = b"loraplex"  # then the SHA-256 of all before it; loaders of libraries don't mind what follows
_SEAL_BYTES = len(_SEAL) + 32
_BUILD = """
import json, sys
from torch.utils.cpp_extension import load
load(**json.loads(sys.argv[1]), is_python_module=False)  # loads it too: a library that crashes does it there
"""


class BuildError(Exception):
    """The library could not be built."""


def library_path() -> Path:
    """Where the library for these sources, this torch and this machine is cached."""
    return cache_folder() / "kernels" / f"loraplex_{_build_key()}.so"


def is_whole(library: Path) -> bool:
    """Whether a library is as it was sealed: half a one would end the process with SIGBUS."""
    try:
        content = library.read_bytes()
    except OSError:
        return False
    seal = content[-_SEAL_BYTES:]
    return seal == _SEAL + hashlib.sha256(content[:-_SEAL_BYTES]).digest()


def build(library: Path, compiler: str) -> None:
    """Build the library and put it, sealed, into its place. Raises BuildError or OSError.

    Each builder works in a folder of its own and moves the result into place: no lock that a killed process leaves
    behind can stop the next one.
    """
    if shutil.which(compiler) is None:
        raise BuildError(f"there is no C++ compiler {compiler!r}")
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent, ignore_cleanup_errors=True) as folder:
        _compile(folder)
        content = (Path(folder) / f"{_NAME}.so").read_bytes()
        sealed = Path(folder) / f"{secrets.token_hex(4)}.so"
        sealed.write_bytes(content + _SEAL + hashlib.sha256(content).digest())
        flush_to_disk(sealed)
        os.replace(sealed, library)
        flush_to_disk(library.parent)


def _compile(folder: str) -> None:
    """Run torch's builder in a process group of its own, and end all of it after BUILD_TIMEOUT_S."""
    options = {
        "name": _NAME,
        "sources": _units(Path(folder)),
        "extra_cflags": [*_flags(), f"-I{SOURCES}"],
        "build_directory": folder,
    }
    # The package `ninja` puts its program beside the interpreter, which is not on PATH outside an activated venv.
    path = os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent)])
    with subprocess.Popen(
        [sys.executable, "-c", _BUILD, json.dumps(options)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PATH": path},
        start_new_session=True,
    ) as builder:
        try:
            output, _ = builder.communicate(timeout=BUILD_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise BuildError(f"the compiler didn't end within {BUILD_TIMEOUT_S:g} s") from None
        finally:
            _end_session(builder.pid)
    if builder.returncode != 0:
        raise BuildError(f"status {builder.returncode}: {output.strip()[-2000:]}")


def _units(folder: Path) -> list[str]:
    """What is compiled side by side, one for each processor: torch's headers take a third of a file's time."""
    sources = sorted(SOURCES.glob("*.cpp"), key=lambda path: path.stat().st_size, reverse=True)
    units: list[list[Path]] = [[] for _ in range(min(len(sources), os.cpu_count() or 1))]
    for source in sources:
        min(units, key=lambda unit: sum(path.stat().st_size for path in unit)).append(source)
    files = [folder / f"unit{i}.cpp" for i in range(len(units))]
    for file, unit in zip(files, units, strict=True):
        file.write_text("".join(f'#include "{path.name}"\n' for path in unit), encoding="utf-8")
    return [str(file) for file in files]


def _end_session(leader: int) -> None:
    """End what is left of a process that leads a session: ninja gives each compiler a process group of its own."""
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            if os.getsid(int(entry.name)) == leader:
                os.kill(int(entry.name), signal.SIGKILL)
    with suppress(OSError):  # without /proc, at least its own group
        os.killpg(leader, signal.SIGKILL)


def load(library: Path) -> None:
    """Make the library's operators known to torch."""
    torch.ops.load_library(str(library))


def _flags() -> list[str]:
    # LORAPLEX_MARCH: a processor with fewer instructions than this one, whose code runs here too.
    march = f"-march={variable('LORAPLEX_MARCH', 'native')}"
    return [*FLAGS, march, *(SANITIZERS if switch("LORAPLEX_SANITIZE", default=False) else ())]


def _build_key() -> str:
    """What the library depends on. By its features a shared cache tells machines apart."""
    sources = [path.read_bytes() for path in sorted(SOURCES.iterdir())]
    parts = [*sources, " ".join(_flags()).encode(), torch.__version__.encode(), _cpu_features().encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _cpu_features() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.machine() + platform.processor()
    lines = cpuinfo.read_text(errors="replace").splitlines()
    return platform.machine() + next((line for line in lines if line.startswith(("flags", "Features"))), "")
