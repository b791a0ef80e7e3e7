"""Which way a decoding step of a variant goes: its layers in one call, their attention in one, or module by module.

`python -m tests.architectures.decode_path` writes it into the table's last column in docs/architectures.md.
"""

import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import transformers
from torch import nn

from loraplex import MultiLoraModel
from loraplex.engine.config import EngineConfig
from loraplex.engine.engine import Engine
from loraplex.engine.worker.fusion.cpu_fusion import stack_of
from loraplex.errors import LoraplexError
from tests.architectures.variants import ARCHS, W, kind_of, make_model

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
COLUMN = "decode"
NONE = "-"  # the engine refuses the variant, or it is no decoder
ONE_CALL, ATTENTION, MODULES = "one call", "attention half", "module by module"


def decode_path(name: str, dtype: torch.dtype = torch.float32) -> str:
    """The way of a variant's layers; of several, each with its number of layers."""
    if kind_of(name) in ("mlm", "seq2seq"):
        return NONE
    base = make_model(name).to(dtype)
    try:
        with Engine(MultiLoraModel(base), EngineConfig(cache_bytes=2**22, max_length=4 * W)):
            ways = [_way(layer) for layer in _layers(base.get_decoder() or base)]
    except LoraplexError:
        return NONE
    kinds = list(dict.fromkeys(ways))
    return kinds[0] if len(kinds) == 1 else ", ".join(f"{way} ({ways.count(way)})" for way in kinds)


def _way(layer: nn.Module) -> str:
    if stack_of(layer) is not None:
        return ONE_CALL
    return ATTENTION if any(stack_of(part) is not None for part in layer.modules()) else MODULES


def _layers(base: nn.Module) -> Sequence[nn.Module]:
    """The longest list of layers."""
    lists = [module for module in base.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=lambda one: sum(1 for _ in one.modules()), default=[base])


def paths_on_page(page: Path = PAGE) -> dict[str, str]:
    """By variant what the page says."""
    rows = [line.strip("|").split("|") for line in page.read_text().splitlines() if line.startswith("| `")]
    return {cells[0].strip().strip("`"): cells[-1].strip() for cells in rows}


def write(paths: Mapping[str, str], page: Path = PAGE) -> None:
    """Replace the last column of the page's table."""
    lines = page.read_text().splitlines()
    for i, line in enumerate(lines):
        if line.startswith("| `"):
            cells = line.strip("|").split("|")
            lines[i] = "|" + "|".join([*cells[:-1], f" {paths[cells[0].strip().strip('`')]} "]) + "|"
    page.write_text("\n".join(lines) + "\n")


def main() -> None:
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    write({name: decode_path(name) for name in ARCHS})


if __name__ == "__main__":
    main()
