"""The gates of all experts in a packed batch, predicted by one call of each mixture's head."""

import torch
from torch import Tensor

from loraplex.engine.sched.request_adapters import BoundMixture, RequestAdapters
from loraplex.engine.worker.input_batch import InputBatch, ScheduledChunk
from loraplex.xlora.mixture import Mixture


class MixtureGates:
    """Gates [modules, columns]; a column is one expert at one token of one part."""

    def __init__(self, batch: InputBatch) -> None:
        main: dict[Mixture, list[tuple[int, int]]] = {}  # part and use, by mixture
        passes: dict[Mixture, list[tuple[int, int]]] = {}
        for i, part in enumerate(batch.parts):
            for use in sorted({route.use for route in part.track.routes if route.use is not None}):
                groups = main if part.scaling is None else passes
                groups.setdefault(_bound(part, use).mixture, []).append((i, use))
        self._batch = batch
        self._places: dict[tuple[int, int], tuple[int, int, int]] = {}  # first column, columns an expert, position
        self._num_columns = 0
        tables = [self._main_gates(mixture, members) for mixture, members in main.items()]
        tables += [self._pass_gates(mixture, members) for mixture, members in passes.items()]
        self.values = torch.cat(tables, dim=1) if tables else torch.zeros(0, 0)

    def columns(self, part: int, use: int, expert: int, start: int, stop: int) -> range:
        """The columns of an expert at the positions [start, stop)."""
        first, stride, position = self._places[part, use]
        column = first + expert * stride + start - position
        return range(column, column + stop - start)

    def _main_gates(self, mixture: Mixture, members: list[tuple[int, int]]) -> Tensor:  # [modules, columns]
        hidden, weights = [], []
        for i, use in members:
            part = self._batch.parts[i]
            bound = _bound(part, use)
            hidden.append(part.sequence.scalings[bound.scaling].hidden(part.start, part.stop))
            weights += [bound.weight] * part.count
        scalings = mixture.head(torch.cat(hidden))  # [tokens, lora_layers, experts]
        self._keep_wanted(members, scalings)
        gates = mixture.gates(scalings[None, None], torch.ones(1))[:, :, 0]  # [modules, experts, tokens]
        return self._place(members, gates * torch.tensor(weights, device=gates.device))

    def _keep_wanted(self, members: list[tuple[int, int]], scalings: Tensor) -> None:
        """Give the scalings to the parts whose requests want them, in the order of their links."""
        offset = 0
        for i, use in members:
            part = self._batch.parts[i]
            observations = part.sequence.observations
            if observations is not None and observations.wants_scalings:
                kept = self._batch.scalings.setdefault(i, [scalings[:0]] * _num_mixtures(part))
                kept[use] = scalings[offset : offset + part.count]
            offset += part.count

    def _pass_gates(self, mixture: Mixture, members: list[tuple[int, int]]) -> Tensor:  # [modules, columns]
        num_tokens = sum(self._batch.parts[i].count for i, _ in members)
        return self._place(members, mixture.pass_gates(1, 1, num_tokens)[:, :, 0])

    def _place(self, members: list[tuple[int, int]], gates: Tensor) -> Tensor:
        num_tokens, offset = gates.shape[2], 0
        for i, use in members:
            part = self._batch.parts[i]
            self._places[i, use] = (self._num_columns + offset, num_tokens, part.start)
            offset += part.count
        self._num_columns += gates.shape[1] * num_tokens
        return gates.flatten(1)


def _bound(part: ScheduledChunk, use: int) -> BoundMixture:
    return _binding(part).mixtures[use]


def _num_mixtures(part: ScheduledChunk) -> int:
    return len(_binding(part).mixtures)


def _binding(part: ScheduledChunk) -> RequestAdapters:
    binding = part.sequence.state.binding
    assert binding is not None, "a sequence runs without its adapters"
    return binding
