"""Checkpoints that clients name: PEFT folders that every server loads, with what training needs beside them.

`tinker://RUN/weights/NAME` is `RUN/weights/NAME` below the server's folder of runs.
"""

import json
import logging
import os
import re
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save_file
from torch import Tensor

from loraplex.adapters.atomic_dir import atomic_folder, check_destination
from loraplex.adapters.peft.reader import read_adapter
from loraplex.adapters.peft.writer import REPLACEABLE, write_adapter_files
from loraplex.adapters.tensor_file import open_tensor_file
from loraplex.adapters.weights import Adapter
from loraplex.errors import AdapterError, CheckpointError, RequestError
from loraplex.json_files import read_object
from loraplex.output_files import whole_file
from loraplex.training.service.journal import folder_bytes
from loraplex.validation import quoted

logger = logging.getLogger(__name__)

CheckpointKind = Literal["training", "sampler", "external"]
SCHEME = "tinker://"
_FOLDERS: Mapping[str, CheckpointKind] = {
    "weights": "training",
    "sampler_weights": "sampler",
    "external_weights": "external",
}
_RECORD, _OPTIMIZER = "checkpoint.json", "optimizer.safetensors"
_RUN = re.compile(r"[A-Za-z0-9_-]{1,64}:(train|copy):[0-9]{1,9}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # that a client may choose
_MAX_CHECKPOINTS = 1000  # of a run, and of one kind
_MAX_UNLISTED = 16  # of a run: of sampling clients alone, which begin a new one with each step
_OWN_NAME = re.compile(r"_?[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # and the server's own
MIN_TTL_S, MAX_TTL_S = 3600, 10 * 366 * 86400


@dataclass(frozen=True)
class CheckpointPath:
    """A checkpoint's address."""

    run_id: str
    folder: str  # weights, sampler_weights, external_weights
    name: str

    @property
    def kind(self) -> CheckpointKind:
        return _FOLDERS[self.folder]

    @property
    def checkpoint_id(self) -> str:
        return f"{self.folder}/{self.name}"

    def __str__(self) -> str:
        return f"{SCHEME}{self.run_id}/{self.folder}/{self.name}"

    @classmethod
    def parse(cls, text: str) -> "CheckpointPath":
        """Raises RequestError."""
        parts = text.removeprefix(SCHEME).split("/")
        is_path = text.startswith(SCHEME) and len(parts) == 3
        if not (is_path and _RUN.fullmatch(parts[0]) and parts[1] in _FOLDERS and _OWN_NAME.fullmatch(parts[2])):
            raise RequestError(
                f"{quoted(text)} is no checkpoint. Give tinker://RUN/weights/NAME or tinker://RUN/sampler_weights/NAME."
            )
        return cls(*parts)


@dataclass(frozen=True, kw_only=True)
class CheckpointRecord:
    """What is known of a checkpoint beside its weights."""

    path: str
    owner: str  # the key's id
    created: float  # seconds since 1970
    seq: int  # of the request that saved it
    rank: int
    base_model: str
    train_attn: bool
    train_mlp: bool
    train_unembed: bool
    user_metadata: Mapping[str, str] | None = None
    expires: float | None = None
    public: bool = False
    listed: bool = True  # False: of a sampling client alone
    num_steps: int = 0

    @property
    def has_expired(self) -> bool:
        return self.expires is not None and self.expires <= time.time()


def is_run_id(text: str) -> bool:
    """Whether it can be a run's id, which names a folder."""
    return _RUN.fullmatch(text) is not None


def check_name(name: str) -> str:
    """Raise RequestError for what can't name a checkpoint."""
    if not _NAME.fullmatch(name):
        raise RequestError(
            f"{quoted(name)} can't name a checkpoint: use 1 to 64 letters, digits, '.', '_' and '-', first a letter "
            "or a digit."
        )
    return name


def check_ttl(ttl_s: int | None) -> None:
    """Raise RequestError for a time to live that isn't possible."""
    if ttl_s is not None and not MIN_TTL_S <= ttl_s <= MAX_TTL_S:
        raise RequestError(f"ttl_seconds is {ttl_s}; {MIN_TTL_S} to {MAX_TTL_S} are possible, or none.")


class Checkpoints:
    """Those below one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, path: CheckpointPath) -> Path:
        return self.root / path.run_id / path.folder / path.name

    def write(
        self,
        adapter: Adapter,
        record: CheckpointRecord,
        optimizer: Mapping[str, Tensor] | None = None,
        *,
        overwrite: bool = False,
    ) -> None:
        """Write a checkpoint, whole or not at all. Raises RequestError for one that exists, and OutputError."""
        path = CheckpointPath.parse(record.path)
        folder = self.folder(path)
        existing = self.find(path)
        if existing is not None and existing.seq == record.seq:
            return  # of the same request, which a server that was killed had carried out
        if existing is not None and not overwrite:
            raise RequestError(f"there is a checkpoint {path.name!r} already. Pass overwrite, or choose another name.")
        if path.kind != "sampler" or record.listed:
            self.of_run(path.run_id)  # what has expired goes
        if existing is None and folder.parent.is_dir() and len(os.listdir(folder.parent)) >= _MAX_CHECKPOINTS:
            raise RequestError(f"the run has {_MAX_CHECKPOINTS} checkpoints in {path.folder!r}. Delete some.")
        files = {*REPLACEABLE, _RECORD, _OPTIMIZER}
        with atomic_folder(folder, partial(check_destination, folder, "a checkpoint", files, overwrite=True)) as new:
            write_adapter_files(adapter, new)
            if optimizer:
                save_file(dict(optimizer), new / _OPTIMIZER)
            (new / _RECORD).write_text(json.dumps(asdict(record), indent=2) + "\n", encoding="utf-8")

    def touch(self, path: CheckpointPath) -> None:
        """Say that it is in use."""
        with suppress(OSError):
            os.utime(self.folder(path) / _RECORD)

    def drop_unlisted(self, run_id: str) -> None:
        """Delete those of a run's sampling clients that were not in use for longest."""
        own = [folder for folder in (self.root / run_id / "sampler_weights").glob("_*") if folder.is_dir()]
        used = {folder: (folder / _RECORD).stat().st_mtime_ns for folder in own if (folder / _RECORD).is_file()}
        for folder in sorted(used, key=lambda folder: -used[folder])[_MAX_UNLISTED:]:
            shutil.rmtree(folder, ignore_errors=True)

    def find(self, path: CheckpointPath) -> CheckpointRecord | None:
        """Its record, or None where there is none or it has expired."""
        file = self.folder(path) / _RECORD
        if not file.is_file():
            return None
        content: Mapping[str, Any] = read_object(file, CheckpointError)
        try:
            record = CheckpointRecord(**content)
        except TypeError as error:
            raise CheckpointError(f"{str(file)!r} is no record of a checkpoint: {error}.") from error
        return None if record.has_expired else record

    def read(self, path: CheckpointPath) -> Adapter:
        """The adapter, checked. Raises AdapterError."""
        return read_adapter(self.folder(path))

    def read_optimizer(self, path: CheckpointPath) -> dict[str, Tensor]:
        """What AdamW had. Raises RequestError for a checkpoint without, and CheckpointError."""
        file = self.folder(path) / _OPTIMIZER
        if path.kind != "training":
            raise RequestError(f"{path} has no optimizer state: only those of save_state have. Load it without.")
        if not file.is_file():  # saved before the first step
            return {}
        try:
            with open_tensor_file(file) as opened:
                return {name: opened.read(name) for name in opened.entries}
        except (OSError, AdapterError, ValueError) as error:
            raise CheckpointError(f"{str(file)!r} can't be read: {error}. Load it without the optimizer.") from error

    def drop_expired(self) -> None:
        """Remove what has expired, of all runs."""
        for run_id in [folder.name for folder in self.root.glob("s-*")]:
            try:
                self.of_run(run_id)
            except CheckpointError as error:
                logger.warning("%s", error)

    def of_run(self, run_id: str) -> list[CheckpointRecord]:
        """A run's checkpoints, newest first; those that have expired are removed."""
        found = []
        for folder in _FOLDERS:
            for file in sorted((self.root / run_id / folder).glob(f"*/{_RECORD}")):
                path = CheckpointPath(run_id, folder, file.parent.name)
                record = self.find(path)
                if record is None:
                    shutil.rmtree(file.parent, ignore_errors=True)
                elif record.listed:
                    found.append(record)
        return sorted(found, key=lambda record: -record.created)

    def change(self, path: CheckpointPath, record: CheckpointRecord) -> None:
        """Replace a checkpoint's record. Raises OutputError."""
        with whole_file(self.folder(path) / _RECORD, lambda file: True, token="tmp") as temporary:
            temporary.write_text(json.dumps(asdict(record), indent=2) + "\n", encoding="utf-8")

    def delete(self, path: CheckpointPath) -> None:
        shutil.rmtree(self.folder(path), ignore_errors=True)

    def num_bytes(self, path: CheckpointPath) -> int:
        return folder_bytes(self.folder(path))
