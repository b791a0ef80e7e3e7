"""Paths that clients name: only folders below the configured roots, whatever links and dots they hold."""

import os
from collections.abc import Sequence
from pathlib import Path

from loraplex.server.api.api_errors import BAD_REQUEST, FORBIDDEN, NOT_FOUND, TOO_LARGE, ApiError

_LONGEST_PATH = 4096
_MAX_FILES = 2_000
_LARGEST_JSON = 2**22
_NOT_READ = ("tokenizer.json", "vocab.json")  # read, if at all, by a tokenizer, within its own bounds


def found_path(path: str, roots: Sequence[str | Path]) -> str:
    """Where a path of the settings leads: relative to a root, as over HTTP, else to the working directory."""
    if os.path.isabs(path):
        return path
    return next((str(Path(root) / path) for root in roots if (Path(root) / path).exists()), path)


class AdapterRoots:
    """Turns a client's path into a checked folder."""

    def __init__(self, roots: Sequence[str | Path], bases: Sequence[str | Path] = ()) -> None:
        self._roots = [Path(os.path.realpath(root)) for root in roots]
        # What relative paths are relative to.
        self._bases = [*self._roots, *(Path(os.path.realpath(base)) for base in bases)]

    @property
    def is_empty(self) -> bool:
        """Whether there is no folder at all to load from."""
        return not self._roots

    def within(self, folders: Sequence[str]) -> "AdapterRoots":
        """The part of the roots that is below these folders, each absolute or relative to a root."""
        named = [Path(folder) if os.path.isabs(folder) else root / folder for folder in folders for root in self._roots]
        real = [Path(os.path.realpath(folder)) for folder in named]
        inside = [folder for folder in real if any(folder.is_relative_to(root) for root in self._roots)]
        return AdapterRoots(tuple(dict.fromkeys(inside)), self._roots)

    def folder(self, path: str) -> Path:
        """The real folder of `path`, absolute or relative to a root or, behind those, to the working directory.

        It and all below it lie in a root.

        Whatever leads out of the roots gets the same 403, whether it exists or not.
        """
        return self._find(path, files=False)

    def source(self, path: str) -> Path:
        """The same, or a file in GGUF."""
        return self._find(path, files=True)

    def _find(self, path: str, *, files: bool) -> Path:
        if not self._roots:
            message = (
                "no adapters are loaded over HTTP: the server has no adapter_roots, or this key no roots below them."
            )
            raise ApiError(FORBIDDEN, message, param="path")
        if not path or len(path) > _LONGEST_PATH or "\0" in path:
            raise ApiError(BAD_REQUEST, "the path is empty, too long, or has a zero byte.", param="path")
        candidates = [Path(path)] if os.path.isabs(path) else [base / path for base in (*self._bases, Path.cwd())]
        inside = [Path(os.path.realpath(candidate)) for candidate in candidates if self._is_inside(candidate)]
        if not inside:
            raise self._forbidden()
        for folder in inside:
            if folder.is_dir():
                self._check_contents(folder)
                return folder
            if files and folder.suffix == ".gguf" and folder.is_file():
                return folder
        raise ApiError(NOT_FOUND, f"there is no folder {path!r} below this server's adapter_roots.", param="path")

    def contains(self, path: str | Path) -> bool:
        """Whether a path that a file names (an expert's folder) is a real one below a root."""
        return os.path.isabs(path) and self._is_inside(Path(path))

    def without_roots(self, message: str) -> str:
        """A message that doesn't tell where the roots are."""
        for root in self._bases:
            message = message.replace(f"{root}{os.sep}", "").replace(str(root), ".")
        return message

    def _is_inside(self, candidate: Path) -> bool:
        """Whether it is below a root when its links are followed, without leading up as it is written."""
        real = Path(os.path.realpath(candidate))
        return ".." not in candidate.parts and any(real.is_relative_to(root) and real != root for root in self._roots)

    def _check_contents(self, folder: Path) -> None:
        """No file below the folder may be a link to the outside, or a device."""
        count = 0
        for parent, folders, files in os.walk(folder):
            for name in (*folders, *files):
                count += 1
                real = Path(os.path.realpath(os.path.join(parent, name)))
                if count > _MAX_FILES or not any(real.is_relative_to(root) for root in self._roots):
                    raise self._forbidden()
                if real.exists() and not (real.is_file() or real.is_dir()):
                    raise self._forbidden()
                if name.endswith(".json") and name not in _NOT_READ and real.is_file():
                    self._check_size(name, real.stat().st_size)

    def _check_size(self, name: str, num_bytes: int) -> None:
        """Settings are parsed at once, while no other thread runs."""
        if num_bytes > _LARGEST_JSON:
            message = f"the folder's {name[:100]!r} has {num_bytes} bytes; {_LARGEST_JSON} are possible."
            raise ApiError(TOO_LARGE, message, param="path")

    def _forbidden(self) -> ApiError:
        message = "the path is not below this server's adapter_roots, or holds links or files that may not be read."
        return ApiError(FORBIDDEN, message, param="path")
