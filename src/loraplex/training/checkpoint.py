"""One file holds everything a run needs to go on; it is replaced as a whole, so a kill leaves the old or the new."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from loraplex.errors import CheckpointError
from loraplex.json_files import parse_json
from loraplex.training.learner import Learner
from loraplex.training.logs import JobLog

FILE = "checkpoint.safetensors"
VERSION = 1
_KEY = "loraplex_training"


def save_checkpoint(
    folder: Path, states: Sequence[Learner], logs: Sequence[JobLog], identity: Mapping[str, Any]
) -> None:
    """Write `folder`/checkpoint.safetensors atomically."""
    tensors = {
        f"{index}.{name}": tensor.detach().cpu().contiguous()
        for index, state in enumerate(states)
        for name, tensor in state.tensors().items()
    }
    content = {
        "version": VERSION,
        "identity": identity,
        "jobs": [state.counters() for state in states],
        "log_bytes": [log.num_bytes for log in logs],
    }
    temporary = folder / f".{FILE}.tmp"
    save_file(tensors, temporary, metadata={_KEY: json.dumps(content)})
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, folder / FILE)


def load_checkpoint(folder: Path, states: Sequence[Learner], identity: Mapping[str, Any]) -> list[int]:
    """Restore the states; return how many bytes of each job's log belong to them.

    Raises CheckpointError where the file is damaged, or was written by a run with other jobs, data or base
    model.
    """
    path = folder / FILE
    try:
        with safe_open(path, framework="pt") as file:
            content = parse_json((file.metadata() or {})[_KEY], finite=False)  # the best loss may be infinite
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a checkpoint that can be read: {error}. Remove it or pass resume=False to start over."
        ) from error
    if content["version"] != VERSION:
        raise CheckpointError(
            f"{path} has version {content['version']}, this loraplex writes version {VERSION}. Finish the "
            "run with the version that started it, or pass resume=False to start over."
        )
    check_same_run(path, content["identity"], identity)
    for index, (state, counters) in enumerate(zip(states, content["jobs"], strict=True)):
        state.restore(_of_job(tensors, index), counters)
    return [int(count) for count in content["log_bytes"]]


def check_same_run(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise CheckpointError, naming the first differences, unless both describe the same run."""
    now = json.loads(json.dumps(now))  # tuples become lists, as in the file
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
