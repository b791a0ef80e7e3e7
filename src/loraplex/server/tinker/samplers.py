"""Checkpoints as adapters to sample with: loaded when they are asked for, the longest unused ones let go."""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable

from loraplex.adapters.weights import Adapter
from loraplex.errors import AdapterExistsError, AdapterNotFoundError, RequestError
from loraplex.models.multi_lora import MultiLoraModel
from loraplex.training.service.checkpoints import SCHEME, CheckpointPath, Checkpoints
from loraplex.training.service.operations import PublishWeights

logger = logging.getLogger(__name__)

PREFIX = "tinker/"  # of their names
_MAX_LOADED = 32
_MAX_UNWRITTEN = 128  # beyond, weights go that could not be written


class SamplerAdapters:
    """Names of checkpoints in the model. Safe to use from many threads."""

    def __init__(self, model: MultiLoraModel, checkpoints: Checkpoints) -> None:
        self._model = model
        self._checkpoints = checkpoints
        self.on_unload: Callable[[str], object] = lambda name: None
        self._lock = threading.Lock()
        self._used: OrderedDict[str, CheckpointPath] = OrderedDict()  # the longest unused one first
        self._unwritten: set[str] = set()  # published from memory, not seen on disk yet

    def publish(self, operation: PublishWeights, adapter: Adapter) -> None:
        """Take weights from a run's memory; raises what loading raises."""
        name = adapter_name(operation.path)
        with self._lock:
            self._model.load_adapter(name, adapter, replace=True)
            self._unwritten.add(name)
            self._note(name, operation.path)

    def has(self, path: CheckpointPath) -> bool:
        """Whether a checkpoint's weights are there, in memory or on disk."""
        return adapter_name(path) in self._model.store or self._checkpoints.find(path) is not None

    def name_of(self, path: CheckpointPath) -> str:
        """The name to sample with, loaded. Raises RequestError for no such checkpoint, and what loading raises."""
        name = adapter_name(path)
        with self._lock:
            if name not in self._model.store:
                if self._checkpoints.find(path) is None:
                    raise RequestError(
                        f"there is no checkpoint {path}. It was never saved, was deleted, or has expired."
                    )
                try:
                    self._model.load_adapter(name, self._checkpoints.folder(path))
                except AdapterExistsError:  # by another way
                    logger.debug("%s was loaded meanwhile", name)
            self._note(name, path)
        self._checkpoints.touch(path)
        return name

    def forget(self, path: CheckpointPath) -> None:
        """Of a checkpoint that was deleted; requests that run finish with it."""
        with self._lock:
            self._unload(adapter_name(path))

    def _note(self, name: str, path: CheckpointPath) -> None:
        self._used[name] = path
        self._used.move_to_end(name)
        for old, where in list(self._used.items())[: max(0, len(self._used) - _MAX_LOADED)]:
            if old in self._unwritten and self._checkpoints.folder(where).is_dir():
                self._unwritten.remove(old)
            if old not in self._unwritten or len(self._used) > _MAX_UNWRITTEN:
                self._unload(old)

    def _unload(self, name: str) -> None:
        self._used.pop(name, None)
        self._unwritten.discard(name)
        try:
            self._model.unload(name)
            self.on_unload(name)
        except AdapterNotFoundError:
            logger.debug("%s was unloaded by another way", name)


def adapter_name(path: CheckpointPath) -> str:
    """`tinker://RUN/sampler_weights/NAME` without what a name can't have."""
    return f"{PREFIX}{path.run_id.replace(':', '/')}/{path.folder}/{path.name}"


def path_of(name: str) -> CheckpointPath | None:
    """The checkpoint that an adapter's name stands for; None for another name."""
    parts = name.removeprefix(PREFIX).split("/")
    if not name.startswith(PREFIX) or len(parts) != 5:
        return None
    try:
        return CheckpointPath.parse(f"{SCHEME}{':'.join(parts[:3])}/{parts[3]}/{parts[4]}")
    except RequestError:
        return None
