"""A process that replaces one adapter's folder again and again, until it is killed."""

import itertools
import multiprocessing
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from loraplex.adapters import atomic_dir as atomic_folder
from loraplex.adapters.config import LoraConfig
from loraplex.adapters.peft.writer import write_adapter
from loraplex.adapters.weights import Adapter, LoraWeights

MODULES = tuple(f"model.layers.{layer}.self_attn.q_proj" for layer in range(2))  # of the tiny Llama

context = multiprocessing.get_context("forkserver")  # which imports torch once
context.set_forkserver_preload([__name__])


def versioned_adapter(version: int) -> Adapter:
    """An adapter whose weights and alpha are both of one version."""
    config = LoraConfig(r=2, lora_alpha=2 * version, target_modules=("q_proj",))
    weights = {
        path: LoraWeights(
            kind="linear",
            lora_a=torch.full((2, 64), float(version)),
            lora_b=torch.full((2, 64), float(version)),
            scaling=config.scaling_of(path),
        )
        for path in MODULES
    }
    return Adapter(config=config, layers=weights)


def version_of(adapter: Adapter) -> int:
    """The version of all weights and of alpha; fails if they are of different ones."""
    values = {value for weights in adapter.layers.values() for value in weights.lora_a.unique().tolist()}
    values |= {value for weights in adapter.layers.values() for value in weights.lora_b.unique().tolist()}
    values |= {weights.scaling for weights in adapter.layers.values()}
    assert len(values) == 1, f"half of one version and half of another: {values}"
    return int(values.pop())


class Writer:
    """The process, and the newest version that it has finished."""

    def __init__(self, folder: Path, *, can_exchange: bool, first: int = 1) -> None:
        self._finished: Any = context.Value("q", 0)
        self._process: BaseProcess = context.Process(
            target=_write, args=(folder, can_exchange, first, self._finished), daemon=True
        )
        self._process.start()
        while self._process.is_alive() and not self.finished:
            time.sleep(0.001)
        assert self._process.is_alive(), "the writer ended by itself"

    @property
    def finished(self) -> int:
        return int(self._finished.value)

    def kill(self) -> None:
        self._process.kill()
        self._process.join()


def _write(folder: Path, can_exchange: bool, first: int, finished: Any) -> None:
    torch.set_num_threads(1)
    if not can_exchange:
        atomic_folder.exchange = lambda one, other: False
        _linger_between_renames()
    for version in itertools.count(first):
        write_adapter(versioned_adapter(version), folder, overwrite=True)
        finished.value = version


def _linger_between_renames() -> None:
    rename = Path.rename

    def slow_rename(self: Path, target: Path) -> Path:
        result = rename(self, target)
        if Path(target).suffix == ".old":  # now nothing is at the folder
            time.sleep(0.03)
        return result

    Path.rename = slow_rename  # type: ignore[method-assign]
