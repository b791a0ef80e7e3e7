"""A set of safetensors files with an index, read as one file."""

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from torch import Tensor

from loraplex.adapters.tensor_file import MAX_HEADER_BYTES, TensorFile, open_tensor_file
from loraplex.errors import AdapterFormatError
from loraplex.json_files import read_object
from loraplex.validation import listed, quoted

MAX_SHARDS = 256
_SHARD = re.compile(r"[A-Za-z0-9_.-]+\.safetensors")  # a name, not a path


class ShardedTensorFile(TensorFile):
    """Open safetensors files that hold one set of tensors together."""

    def __init__(self, index: Path, shards: Sequence[TensorFile]) -> None:
        self.path = index
        self.num_bytes = sum(shard.num_bytes for shard in shards)
        self.metadata = {}
        self.entries = {name: entry for shard in shards for name, entry in shard.entries.items()}
        self._shards = {name: shard for shard in shards for name in shard.entries}

    def read(self, name: str) -> Tensor:
        stored = self.entries[name].name
        return self._shards[stored].read(stored)


@contextmanager
def open_sharded_file(index: Path) -> Iterator[TensorFile]:
    """Open what an index such as adapter_model.safetensors.index.json names.

    Raises AdapterFormatError if a file is missing or damaged, or doesn't hold what the index says.
    """
    files = _files_of(index)
    with ExitStack() as opened:
        shards = [opened.enter_context(open_tensor_file(index.parent / name)) for name in sorted(set(files.values()))]
        for shard in shards:
            named = {name for name, file in files.items() if file == shard.path.name}
            if named != shard.entries.keys():
                raise AdapterFormatError(
                    f"{shard.path} and {index.name} disagree about {listed(named ^ shard.entries.keys())}. Download "
                    "both again."
                )
        yield ShardedTensorFile(index, shards)


def _files_of(index: Path) -> dict[str, str]:
    """By tensor, the name of the file that has it."""
    files = read_object(index, AdapterFormatError, max_bytes=MAX_HEADER_BYTES).get("weight_map")
    if not (isinstance(files, dict) and files and all(isinstance(file, str) for file in files.values())):
        raise AdapterFormatError(f"{index} has no weight_map, which names each tensor's file. Download it again.")
    names = set(files.values())
    wrong = [name for name in names if _SHARD.fullmatch(name) is None]
    if wrong or len(names) > MAX_SHARDS:
        raise AdapterFormatError(
            f"{index} names {len(names)} files, such as {quoted(min(wrong or names))}; they must be safetensors files "
            f"beside it, and {MAX_SHARDS} at most."
        )
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise AdapterFormatError(
            f"{index} names {listed(missing)}, which {'is' if len(missing) == 1 else 'are'} missing."
        )
    return files
