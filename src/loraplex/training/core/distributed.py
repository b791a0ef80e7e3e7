"""The processes of one run: each computes its share of every micro-batch, and the first one writes."""

from collections.abc import Sequence
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor

Row = TypeVar("Row")


class ProcessGroup:
    """One process by default; several under `accelerate launch`."""

    def __init__(self, device: torch.device) -> None:
        self._state = PartialState(cpu=device.type == "cpu")

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
