"""The ordering file of mistral.rs: what early X-LoRA folders don't say about their experts and LoRA layers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraplex.errors import AdapterFormatError
from loraplex.json_files import read_object
from loraplex.validation import listed

PATTERN = "*ordering*.json"


@dataclass(frozen=True, kw_only=True)
class Ordering:
    """The experts in the head's order, and the paths of the LoRA layers in the head's order where they are known."""

    experts: tuple[str, ...]
    layers: tuple[str, ...] | None = None


def read_ordering(folder: Path) -> Ordering | None:
    """Read the ordering file in `folder`, if there is one: {"order": [experts], "layers": {module path: number}}.

    Raises AdapterFormatError.
    """
    files = sorted(folder.glob(PATTERN))
    if not files:
        return None
    if len(files) > 1:
        raise AdapterFormatError(
            f"{str(folder)!r} has {listed([file.name for file in files])}. Keep one ordering file."
        )
    content = read_object(files[0], AdapterFormatError)
    order, layers = content.get("order"), content.get("layers")
    if not (isinstance(order, list) and order and all(isinstance(name, str) for name in order)):
        raise AdapterFormatError(f"{files[0]}: order is {order!r}; it must list the experts in the head's order.")
    return Ordering(experts=tuple(order), layers=None if layers is None else _in_order(layers, files[0]))


def _in_order(layers: Any, file: Path) -> tuple[str, ...]:
    if isinstance(layers, dict):
        numbers = {path: int(number) if str(number).isdecimal() else -1 for path, number in layers.items()}
        if sorted(numbers.values()) == list(range(len(numbers))):
            return tuple(sorted(numbers, key=numbers.__getitem__))
    raise AdapterFormatError(f"{file}: layers must number the LoRA layers from 0 on, each once.")
