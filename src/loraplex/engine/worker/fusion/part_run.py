"""How one module of a layer ran in a pass."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class PartRun:
    """One module's part in a pass. Input and output are copies: some modules are changed in place behind."""

    path: str
    module: nn.Module
    input: Tensor
    output: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    returned: Any
