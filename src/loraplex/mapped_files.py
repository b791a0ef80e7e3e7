"""Pages of a checkpoint's file that lie in memory beside what was made of them.

transformers maps a checkpoint, and its tensors are views of the file. Once such a tensor is replaced by another, its
pages stay in the process as long as any other tensor holds the mapping. They are given back to the system here, which
has the file: whoever reads them again, reads them from there.
"""

import ctypes
import mmap
import re
from collections.abc import Iterable
from pathlib import Path

_SMAPS = Path("/proc/self/smaps")  # Linux
_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ (\d+) +(/.*)")

Range = tuple[int, int]  # first byte, and the one behind the last


def let_file_pages_go(unused: Iterable[Range]) -> int:
    """Give the whole pages of these addresses back, where they are a file's as it is; how many bytes that were.

    A page that was written to is no page of the file any more: mappings with any such page stay as they are, and so
    does everything on other systems than Linux.
    """
    wanted = [(start, stop) for start, stop in unused if stop > start]
    if not wanted or not _SMAPS.exists() or not hasattr(mmap, "MADV_DONTNEED"):
        return 0
    advise = ctypes.CDLL(None, use_errno=True).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    num_bytes = 0
    for first, last in _unchanged_files():
        for start, stop in wanted:
            low = -(-max(start, first) // mmap.PAGESIZE) * mmap.PAGESIZE
            high = min(stop, last) // mmap.PAGESIZE * mmap.PAGESIZE
            if low < high and advise(low, high - low, mmap.MADV_DONTNEED) == 0:
                num_bytes += high - low
    return num_bytes


def trim_heap() -> None:
    """Give the system back what the C library keeps of freed memory; only glibc can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _unchanged_files() -> list[Range]:
    """The mappings of files of which no page has been written to."""
    found: list[Range] = []
    current: Range | None = None
    for line in _SMAPS.read_text().splitlines():
        mapping = _MAPPING.match(line)
        if mapping is not None:
            current = (int(mapping[1], 16), int(mapping[2], 16)) if mapping[3] != "0" else None
        elif "-" in line.split(" ", 1)[0]:  # memory without a file
            current = None
        elif current is not None and line.startswith("Anonymous:"):
            if line.split()[1] == "0":
                found.append(current)
            current = None
    return found
