"""What an adapter's files are read for: a base model's modules, and the names that these had before."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from loraplex.adapters.weights import ModuleShape

Renaming = Callable[[str], str]  # of a parameter's path: "language_model.model.norm.weight"


def no_renamings() -> Sequence[Renaming]:
    """For a base model whose modules were never called otherwise."""
    return ()


@dataclass(frozen=True, kw_only=True)
class BaseLayout:
    """The base model that an adapter is read for."""

    shapes: Mapping[str, ModuleShape]  # its linear and embedding modules, by path
    model_type: str | None  # of its config
    renamings: Callable[[], Sequence[Renaming]] = no_renamings  # asked for where names don't fit as they are
