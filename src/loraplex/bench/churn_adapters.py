"""The adapters of a churn: some stay, some are replaced and unloaded, and which version was there when is kept."""

import random
from dataclasses import dataclass
from pathlib import Path

from loraplex.adapters.peft.writer import write_adapter
from loraplex.bench.random_adapters import TINY, random_adapter
from loraplex.models.multi_lora import MultiLoraModel
from loraplex.routing.adapter_spec import AdapterSpec
from loraplex.xlora.config import XLoraConfig

STABLE = ("stable0", "stable1")
CHANGING = ("changing0", "changing1", "changing2")
MIXTURE = "mixture"  # of the stable ones
NUM_VERSIONS = 3
_STAYING = (None, "stable0", "stable0:0.5+stable1:0.7", MIXTURE, f"{MIXTURE}+stable0:0.3")
_WITH_CHANGING = ("{}", "{}:0.5+stable1", f"{MIXTURE}:0.5+{{}}")


@dataclass(frozen=True)
class DrawnSpec:
    """A row's adapters; `changing` is the one among them that comes and goes."""

    template: str | None
    changing: str | None = None

    def row(self) -> AdapterSpec:
        """As a request asks for it."""
        return None if self.template is None else self.template.format(self.changing)

    def with_version(self, version: int | None) -> AdapterSpec:
        """The same through the adapter that keeps this version for ever."""
        return None if self.template is None else self.template.format(_kept_name(self.changing, version))


def draw_spec(draw: random.Random) -> DrawnSpec:
    """Half of them with an adapter that changes."""
    if draw.random() < 0.5:
        return DrawnSpec(draw.choice(_STAYING))
    return DrawnSpec(draw.choice(_WITH_CHANGING), draw.choice(CHANGING))


class ChurnAdapters:
    """Loads, replaces and unloads; `moment` is any number that grows."""

    def __init__(self, model: MultiLoraModel, model_name: str, folder: Path) -> None:
        self._model = model
        self._folder = folder
        self._history: dict[str, list[tuple[int, int | None]]] = {name: [] for name in CHANGING}
        std_b = 0.2 if model_name == TINY else 0.02  # strong enough that versions answer differently
        names = [*STABLE, *(_kept_name(name, version) for name in CHANGING for version in range(NUM_VERSIONS))]
        for seed, name in enumerate(names):
            rank = (4, 8, 16)[seed % 3]
            write_adapter(random_adapter(model.adaptable.shapes, rank, model.dtype, seed, std_b), folder / name)
            model.load_adapter(name, folder / name)
        model.create_mixture(MIXTURE, STABLE, XLoraConfig(layerwise_scalings=True))
        for name in CHANGING:
            self.load(name, 0, moment=0)

    def folder_of(self, name: str, version: int | None = None) -> Path:
        return self._folder / (name if name in STABLE else _kept_name(name, version))

    def is_loaded(self, name: str) -> bool:
        return self._history[name][-1][1] is not None

    def load(self, name: str, version: int, moment: int) -> None:
        """Load a version, or replace the one that is there."""
        self._model.load_adapter(name, self.folder_of(name, version), replace=name in self._model.store)
        self._history[name].append((moment, version))

    def unload(self, name: str, moment: int) -> None:
        self._model.unload(name)
        self._history[name].append((moment, None))

    def versions_between(self, name: str | None, start: int, end: int) -> frozenset[int | None]:
        """Which versions a request could find that came at `start` and had begun by `end`; None: it was unloaded."""
        if name is None:
            return frozenset((None,))
        before = [version for moment, version in self._history[name] if moment <= start]
        return frozenset(before[-1:] + [version for moment, version in self._history[name] if start < moment <= end])


def _kept_name(name: str | None, version: int | None) -> str:
    return f"kept/{name}/{version}"
