"""The adapter that a prompt is for: nearest centroid, by the base model's last hidden state at the prompt's last token.

score = cos(h - background, mean - background), the background being what prompts about anything have in common. The
last token is the only one that every prefill computes, whatever the prefix cache has; docs/auto.md has what else was
tried.
"""

import threading
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from loraplex.adapters.prompt_centroid import PromptCentroid
from loraplex.errors import BaseModelMismatchError, ConfigError, RequestError

DEFAULT_FLOOR = 0.55  # 95 % of prompts about something else score less; docs/auto.md


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """What `auto` may choose from."""

    names: Collection[str] | None = None  # None: all that have a centroid
    base: bool = True  # whether the base model answers what is near none of them


@dataclass(frozen=True, kw_only=True)
class AutoChoice:
    """What `auto` chose for a prompt."""

    name: str | None  # None: the base model
    score: float | None  # of the nearest candidate, -1 to 1, chosen or not; None: there were no candidates
    num_candidates: int


@dataclass(frozen=True, kw_only=True, eq=False)
class _Table:
    """The centroids, ready to be compared."""

    places: dict[str, int]
    names: tuple[str, ...]
    directions: Tensor  # [names, hidden], of length 1
    backgrounds: Tensor  # [different ones, hidden]
    background_of: Tensor  # [names]


class AutoIndex:
    """The centroids of what is loaded. Safe to use from many threads."""

    def __init__(self) -> None:
        self._centroids: dict[str, PromptCentroid] = {}
        self._table: _Table | None = None
        self._lock = threading.Lock()

    def set(self, name: str, centroid: PromptCentroid | None) -> None:
        """Let a name have this centroid; None: no longer any."""
        with self._lock:
            if centroid is not None:
                self._centroids[name] = centroid
            elif self._centroids.pop(name, None) is None:
                return
            self._table = None

    def forget(self, names: Collection[str]) -> None:
        """Let names no longer have centroids."""
        for name in names:
            self.set(name, None)

    def get(self, name: str) -> PromptCentroid | None:
        return self._centroids.get(name)

    def names(self) -> list[str]:
        """What can be chosen, sorted."""
        with self._lock:
            return sorted(self._centroids)

    def has_any(self, candidates: Candidates) -> bool:
        """Whether there is something to choose from."""
        return bool(self._among(self._known(), candidates))

    def check(self, candidates: Candidates) -> None:
        """Raise RequestError if nothing could answer."""
        if not candidates.base and not self.has_any(candidates):
            raise RequestError(
                "adapters='auto' has nothing to choose from: no adapter that may be used here has a prompt centroid, "
                "and the base model may not answer. Make centroids with `loraplex auto fit`, or name an adapter."
            )

    def choose(self, hidden: Tensor, candidates: Candidates, floor: float) -> AutoChoice:  # [hidden]
        """The candidate nearest to a prompt's state; the base model below the floor.

        Raises RequestError where the base model may not answer.
        """
        table = self._known()
        places = self._among(table, candidates)
        name, score = None, None
        if places:
            scores = _scores(hidden.detach().float().cpu(), table)
            if len(places) < len(scores):
                scores = scores[places]
            best = int(scores.argmax())
            score = float(scores[best])
            name = table.names[places[best]] if score >= floor else None
        if name is None and not candidates.base:
            told = "there are no candidates" if score is None else f"the nearest has {score:.3f} of the floor {floor:g}"
            raise RequestError(
                f"adapters='auto' found no adapter for this prompt ({told}), and the base model may not answer here. "
                "Name an adapter."
            )
        return AutoChoice(name=name, score=score, num_candidates=len(places))

    def _known(self) -> _Table:
        with self._lock:
            if self._table is None:
                self._table = _table(self._centroids)
            return self._table

    @staticmethod
    def _among(table: _Table, candidates: Candidates) -> list[int]:
        """The places of the candidates."""
        if candidates.names is None:
            return list(range(len(table.names)))
        return sorted(place for name in set(candidates.names) if (place := table.places.get(name)) is not None)


def check_centroid(centroid: PromptCentroid, hidden_size: int, name: str) -> None:
    """Raise BaseModelMismatchError for a centroid of another base model."""
    if len(centroid.mean) != hidden_size:
        raise BaseModelMismatchError(
            f"the prompt centroid of {name!r} was made for hidden states of size {len(centroid.mean)}, but this base "
            f"model's have {hidden_size}. Make it again with `loraplex auto fit`."
        )


def check_floor(floor: float) -> None:
    """Raise ConfigError for what is no score."""
    if isinstance(floor, bool) or not isinstance(floor, int | float) or not -1 <= floor <= 1:
        raise ConfigError(f"auto_floor is {floor!r}; it must be a number from -1 (always an adapter) to 1.")


def _table(centroids: dict[str, PromptCentroid]) -> _Table:
    names = tuple(sorted(centroids))
    backgrounds: dict[bytes, tuple[int, Tensor]] = {}  # those of adapters fitted together are the same
    for name in names:
        background = centroids[name].background
        backgrounds.setdefault(background.numpy().tobytes(), (len(backgrounds), background))
    directions = [torch.nn.functional.normalize(centroids[name].direction, dim=0) for name in names]
    return _Table(
        places={name: place for place, name in enumerate(names)},
        names=names,
        directions=torch.stack(directions) if names else torch.zeros(0, 0),
        backgrounds=torch.stack([background for _, background in backgrounds.values()]) if names else torch.zeros(0, 0),
        background_of=torch.tensor([backgrounds[centroids[name].background.numpy().tobytes()][0] for name in names]),
    )


def _scores(hidden: Tensor, table: _Table) -> Tensor:  # [names]
    offsets = torch.nn.functional.normalize(hidden - table.backgrounds, dim=-1)  # [different backgrounds, hidden]
    if len(offsets) == 1:
        return table.directions @ offsets[0]
    return (table.directions * offsets[table.background_of]).sum(dim=-1)
