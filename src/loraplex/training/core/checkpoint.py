"""One file holds everything a run needs to go on; it is replaced as a whole, so a kill leaves the old or the new."""

import hashlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from loraplex.adapters.tensor_file import TensorFile, open_tensor_file
from loraplex.errors import AdapterError, CheckpointError
from loraplex.json_files import parse_json
from loraplex.output_files import unwritable, whole_file
from loraplex.training.core.train_state import TrainState

logger = logging.getLogger(__name__)

FILE = "checkpoint.safetensors"
VERSION = 2  # 1 had no digest
_KEY = "loraplex_training"
_DIGEST = "loraplex_sha256"


def save_checkpoint(
    folder: Path, states: Sequence[TrainState], log_bytes: Sequence[int], identity: Mapping[str, Any]
) -> None:
    """Write `folder`/checkpoint.safetensors atomically. Raises OutputError."""
    tensors = {
        f"{index}.{name}": tensor.detach().cpu().contiguous()
        for index, state in enumerate(states)
        for name, tensor in state.tensors().items()
    }
    content = {
        "version": VERSION,
        "identity": identity,
        "jobs": [state.counters() for state in states],
        "log_bytes": log_bytes,
    }
    with whole_file(folder / FILE, is_checkpoint, token="tmp") as temporary:
        try:
            text = json.dumps(content)
            save_file(tensors, temporary, metadata={_KEY: text, _DIGEST: _digest(text, tensors)})
        except SafetensorError as error:  # what it makes of an OSError
            raise unwritable(folder / FILE, error) from error


def is_checkpoint(path: Path) -> bool:
    """Whether a file begins as a checkpoint does, damaged or not: safetensors has the metadata first."""
    with path.open("rb") as file:
        return _KEY.encode() in file.read(512)


def load_checkpoint(folder: Path, states: Sequence[TrainState], identity: Mapping[str, Any]) -> list[int]:
    """Restore the states; return how many bytes of each job's log belong to them.

    Jobs that diverged may be left out, or have other settings: then they begin anew. Raises CheckpointError where the
    file is damaged, or was written by a run with other jobs, data or base model.
    """
    path = folder / FILE
    content, tensors = _read(path, states)
    identity = json.loads(json.dumps(identity))  # tuples become lists, as in the file
    try:
        before, counters = content["identity"], content["jobs"]
        names = before.get("names") or [state.name for state in states]  # a mixture is a run's only job
        given_up = _given_up(names, before, identity, counters)
        check_same_run(path, _without(before, given_up), _without(identity, given_up))
        log_bytes = []
        for state in states:
            if state.name in given_up:
                logger.warning("job %r diverged with other settings and begins anew", state.name)
                log_bytes.append(0)
                continue
            index = names.index(state.name)
            state.restore(_of_job(tensors, index), counters[index])
            log_bytes.append(max(0, int(content["log_bytes"][index])))
        return log_bytes
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
        raise _damaged(path, error) from error


def _read(path: Path, states: Sequence[TrainState]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What save_checkpoint wrote, no more than these states can have. Raises CheckpointError."""
    most = max((state.flat.numel() for state in states), default=0)
    try:
        with open_tensor_file(path) as file:
            text = file.metadata[_KEY]
            content = parse_json(text, finite=False)  # the best loss may be infinite
            version = content["version"]
            tensors = {}
            if version == VERSION:
                _check_sizes(file, most)
                tensors = {name: file.read(name) for name in file.entries}
                if file.metadata[_DIGEST] != _digest(text, tensors):
                    raise ValueError("its content is not what was written")
    except (OSError, AdapterError, KeyError, TypeError, ValueError) as error:
        raise _damaged(path, error) from error
    if version != VERSION:
        raise CheckpointError(
            f"{path} has version {version!r}, this loraplex writes version {VERSION}. Finish the "
            "run with the version that started it, or pass resume=False to start over."
        )
    return content, tensors


def _check_sizes(file: TensorFile, most: int) -> None:
    """Raise ValueError for a tensor of more values than the largest state: a few bytes can ask for any memory."""
    for entry in file.entries.values():
        if math.prod(entry.shape) > max(most, 1):
            raise ValueError(f"{entry.name!r} has {math.prod(entry.shape)} values, the run's jobs {most} at most")


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """Of everything that a checkpoint holds: a flipped bit is none of the run's."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path} is not a checkpoint that can be read: {type(error).__name__}: {error}. Remove it or pass resume=False "
        "to start over."
    )


def _given_up(
    names: Sequence[str], before: Mapping[str, Any], now: Mapping[str, Any], counters: Sequence[Mapping[str, Any]]
) -> set[str]:
    """The jobs of a run of adapters that diverged and now are not there, or not the same."""
    diverged = [
        name for name, of_job in zip(names, counters, strict=True) if of_job["progress"]["finished"] == "diverged"
    ]
    jobs = before.get("jobs", {})
    return {name for name in diverged if name in jobs and jobs[name] != now["jobs"].get(name)}


def _without(identity: Mapping[str, Any], given_up: set[str]) -> dict[str, Any]:
    if not given_up:
        return dict(identity)
    jobs = {name: of_job for name, of_job in identity["jobs"].items() if name not in given_up}
    return {**identity, "names": [name for name in identity["names"] if name not in given_up], "jobs": jobs}


def check_same_run(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise CheckpointError, naming the first differences, unless both describe the same run."""
    differences = _differences(before, now, "")
    if differences:
        few = "; ".join(differences[:5])
        more = f" (and {len(differences) - 5} more)" if len(differences) > 5 else ""
        raise CheckpointError(
            f"{path} is from another run: {few}{more}. Go on with what it was started with, choose another "
            "output folder, or pass resume=False to start over."
        )


def _differences(before: Any, now: Any, where: str) -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [*before, *(key for key in now if key not in before)]
        return [
            difference
            for key in keys
            for difference in _differences(before.get(key), now.get(key), f"{where}.{key}" if where else str(key))
        ]
    return [] if before == now else [f"{where} was {before!r} and is {now!r}"]


def _of_job(tensors: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
    prefix = f"{index}."
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
