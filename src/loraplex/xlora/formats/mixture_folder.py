"""What a mixture's folder holds, whichever layout it has."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from torch import Tensor

from loraplex.xlora.config import XLoraConfig

Layout = Literal["peft", "xlora"]  # "xlora" is the original package's
LAYOUTS: tuple[str, ...] = get_args(Layout)


@dataclass(frozen=True, kw_only=True)
class MixtureFolder:
    """A mixture at rest: its settings, its whole scaling head, and where its experts are."""

    layout: Layout
    config: XLoraConfig
    hidden_size: int
    head: Mapping[str, Tensor]  # under ScalingHead's names, in the file's dtypes
    expert_names: tuple[str, ...]  # in the head's order
    experts: Mapping[str, Path | str]  # by name: a folder, or the hub id of an adapter; empty if not looked for
    base_model_name: str | None
    num_layers: int | None  # LoRA layers the head was made for; None: not layerwise, the head doesn't say
    layers: tuple[str, ...] | None = None  # their module paths in the head's order, where the folder says them

    @property
    def num_experts(self) -> int:
        return len(self.expert_names)
