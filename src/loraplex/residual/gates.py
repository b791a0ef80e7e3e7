"""Gates on linear modules, as (IA)^3 learns them (arXiv 2205.05638)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from loraplex.residual.fingerprint import BaseFingerprint


@dataclass(frozen=True, kw_only=True, eq=False)
class GateResidual:
    """A vector l for each of some linear modules, by its path: PEFT's IA3.

        y = (1 + weight (l - 1)) * (W x + bias)       of `outputs`, l [out]
        y = W ((1 + weight (l - 1)) * x) + bias       of `inputs`, l [in]: PEFT's feedforward modules

    At weight 1 this is PEFT's formula; PEFT has no weights. In a link, gates multiply, and a gate on an output acts on
    what the module and the link's LoRAs make together.
    """

    no_lora_because: ClassVar[str] = "it multiplies what a module reads or makes, which is no low-rank change"
    outputs: Mapping[str, Tensor] = field(default_factory=dict)
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    base: BaseFingerprint | None = None

    @property
    def layers(self) -> None:
        """Gates belong to modules, not to layers."""
        return None

    @property
    def num_parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.tensors())

    def tensors(self) -> Iterator[Tensor]:
        yield from self.outputs.values()
        yield from self.inputs.values()

    def to(self, device: torch.device) -> "GateResidual":
        """The same gates on a device."""
        return replace(
            self,
            outputs={path: gate.to(device) for path, gate in self.outputs.items()},
            inputs={path: gate.to(device) for path, gate in self.inputs.items()},
        )
