"""The processes of one run: each computes its share of every micro-batch, and the first one writes."""

from collections.abc import Sequence
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env, reduce
from torch import Tensor

Row = TypeVar("Row")


def join_processes(*, cpu: bool) -> PartialState:
    """accelerate's state of this process, made by the first call: on CPUs where nothing else is there, or asked for.

    Without being told so, accelerate takes processes on CPUs for strangers.
    """
    asked = cpu or parse_flag_from_env("ACCELERATE_USE_CPU")
    return PartialState(cpu=asked or not torch.accelerator.is_available())


class ProcessGroup:
    """One process by default; several under `accelerate launch` and torchrun."""

    def __init__(self, device: torch.device, *, sharded: bool = False) -> None:
        """`device` is the base model's; one that is to be sharded goes from there to the devices accelerate chooses."""
        self._state = join_processes(cpu=device.type == "cpu" and not sharded)

    @property
    def is_first(self) -> bool:
        return bool(self._state.is_main_process)

    @property
    def num_processes(self) -> int:
        return int(self._state.num_processes)

    @property
    def device(self) -> torch.device:
        """This process's own."""
        return torch.device(self._state.device)

    @property
    def index(self) -> int:
        return int(self._state.process_index)

    def share(self, rows: Sequence[Row]) -> list[Row]:
        """Every n-th row for each of n processes."""
        return list(rows[self._state.process_index :: self._state.num_processes])

    def add_up(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, on each of them."""
        return tensor if self.num_processes == 1 else reduce(tensor, "sum")

    def any(self, flag: bool) -> bool:
        """Whether the flag is up on any process; the same answer on each of them."""
        if self.num_processes == 1:
            return flag
        return bool(self.add_up(torch.tensor([float(flag)], device=self._state.device)) > 0)

    def wait(self) -> None:
        """Go on when every process has come here."""
        self._state.wait_for_everyone()
