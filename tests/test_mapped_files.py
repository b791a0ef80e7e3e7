"""Pages of mapped files go back to the system, and what they hold can still be read."""

import mmap
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loraplex.mapped_files import let_file_pages_go, trim_heap

pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux tells what is resident")

SIZE = 8 * 2**20


def place(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes


def resident(path: Path) -> int:
    """Bytes of the file's mappings that are in memory."""
    parts = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)
    found = [
        re.search(r"^Rss: +(\d+) kB", part, re.MULTILINE) for part in parts if str(path) in part.partition("\n")[0]
    ]
    return sum(int(match[1]) * 1024 for match in found if match)


@pytest.fixture
def mapped(tmp_path: Path) -> tuple[Path, Tensor, Tensor]:
    """A file's path, and two tensors that are views of it, read once."""
    path = tmp_path / "a.safetensors"
    values = torch.arange(SIZE // 4, dtype=torch.int32)
    save_file({"a": values, "b": values + 1}, path)
    tensors = load_file(path)
    assert int(tensors["a"].sum()) + int(tensors["b"].sum()) != 0
    assert resident(path) > 1.9 * SIZE
    return path, tensors["a"], tensors["b"]


def test_pages_that_nobody_needs_go_and_can_be_read_again(mapped: tuple[Path, Tensor, Tensor]) -> None:
    path, first, second = mapped
    before = resident(path)
    let_go = let_file_pages_go([place(first)])
    assert SIZE - 2 * mmap.PAGESIZE <= let_go <= SIZE
    assert resident(path) <= before - let_go
    assert torch.equal(first, torch.arange(SIZE // 4, dtype=torch.int32))
    assert torch.equal(second, first + 1)


def test_a_mapping_that_was_written_to_stays(mapped: tuple[Path, Tensor, Tensor]) -> None:
    path, first, second = mapped
    first[5] = 99
    assert let_file_pages_go([place(first), place(second)]) == 0
    assert first[5] == 99
    assert resident(path) > 1.9 * SIZE


def test_memory_without_a_file_stays() -> None:
    values = torch.full((SIZE // 4,), 7, dtype=torch.int32)
    assert let_file_pages_go([place(values)]) == 0
    assert bool((values == 7).all())
    assert let_file_pages_go([]) == 0
    trim_heap()
