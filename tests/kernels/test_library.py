"""The compiled library's cache: what is damaged is built again, what hangs ends, what is whole needs no compiler."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from loraplex.kernels import library
from loraplex.kernels.native import native_available

needs_compiler = pytest.mark.skipif(not native_available(), reason="the compiled kernels can't be built here")
CODE = "from loraplex.kernels.native import native_available; print(native_available())"


def in_process(cache: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"LORAPLEX_CACHE": str(cache)} | variables
    return subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the library in a cache of its own."""
    whole = library.library_path()
    monkeypatch.setenv("LORAPLEX_CACHE", str(tmp_path))
    mine = library.library_path()
    mine.parent.mkdir(parents=True)
    shutil.copyfile(whole, mine)
    return mine


@needs_compiler
def test_whole_library_serves_where_there_is_no_compiler(cached: Path, tmp_path: Path) -> None:
    assert in_process(tmp_path, CXX="no-such-compiler").stdout == "True\n"


@needs_compiler
@pytest.mark.parametrize("kept", [0.0, 0.3, 0.999])
def test_truncated_library_is_not_loaded(cached: Path, tmp_path: Path, kept: float) -> None:
    content = cached.read_bytes()
    cached.write_bytes(content[: int(len(content) * kept)])
    assert not library.is_whole(cached)
    found = in_process(tmp_path, CXX="no-such-compiler")
    assert (found.returncode, found.stdout) == (0, "False\n")


@needs_compiler
def test_library_with_another_byte_is_not_whole(cached: Path) -> None:
    content = bytearray(cached.read_bytes())
    assert library.is_whole(cached)
    content[len(content) // 2] ^= 1
    cached.write_bytes(content)
    assert not library.is_whole(cached)


@needs_compiler
@pytest.mark.slow
def test_truncated_library_is_built_again(cached: Path, tmp_path: Path) -> None:
    cached.write_bytes(cached.read_bytes()[:5000])
    assert in_process(tmp_path).stdout == "True\n"
    assert library.is_whole(cached)
    assert [path.name for path in cached.parent.iterdir()] == [cached.name], "the builder's folder stayed"


def script(folder: Path, body: str) -> str:
    file = folder / "compiler"
    file.write_text(f"#!/bin/sh\n{body}\n")
    file.chmod(0o755)
    return str(file)


def test_compiler_that_hangs_is_ended_with_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "BUILD_TIMEOUT_S", 6.0)
    started = tmp_path / "pid"
    compiler = script(tmp_path, f"sleep 1000 & echo $! > {started}; wait")
    monkeypatch.setenv("CXX", compiler)
    start = time.monotonic()
    with pytest.raises(library.BuildError, match="didn't end within 6 s"):
        library.build(tmp_path / "kernels" / "x.so", compiler)
    assert time.monotonic() - start < 30
    assert not (tmp_path / "kernels" / "x.so").exists()
    if started.exists():  # the builder got as far as the compiler
        time.sleep(0.2)
        status = Path(f"/proc/{started.read_text().strip()}/stat")
        assert not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] == "Z"


def test_compiler_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", script(tmp_path, "echo out of cheese >&2; exit 3"))
    with pytest.raises(library.BuildError, match="status"):
        library.build(tmp_path / "kernels" / "x.so", str(tmp_path / "compiler"))
    with pytest.raises(library.BuildError, match="no C"):
        library.build(tmp_path / "kernels" / "x.so", "no-such-compiler")
