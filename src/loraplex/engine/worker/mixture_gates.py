"""X-LoRA's heads in the engine: from the hidden states of scaling passes to gates for the main passes' tokens."""

import torch
from torch import Tensor

from loraplex.engine.sched.chunk import ScheduledChunk
from loraplex.engine.sched.request_adapters import BoundMixture, RequestAdapters
from loraplex.engine.worker.input_batch import InputBatch
from loraplex.xlora.mixture import Mixture


class MixtureGates:
    """Gates [modules, columns] that the scaling heads predict; a column is one expert at one token of one chunk."""

    def __init__(self, batch: InputBatch) -> None:
        """Call the heads on what the scaling passes left for the batch's tokens."""
        main: dict[Mixture, list[tuple[int, int]]] = {}  # part and use, by mixture
        passes: dict[Mixture, list[tuple[int, int]]] = {}
        for i, chunk in enumerate(batch.chunks):
            for use in sorted({route.use for route in chunk.kv.routes if route.use is not None}):
                groups = main if chunk.scaling is None else passes
                groups.setdefault(_bound(chunk, use).mixture, []).append((i, use))
        self._batch = batch
        self._places: dict[tuple[int, int], tuple[int, int, int]] = {}  # first column, columns an expert, position
        self._num_columns = 0
        tables = [self._main_gates(mixture, members) for mixture, members in main.items()]
        tables += [self._pass_gates(mixture, members) for mixture, members in passes.items()]
        self.values = torch.cat(tables, dim=1) if tables else torch.zeros(0, 0)

    def columns(self, chunk: int, use: int, expert: int, start: int, stop: int) -> range:
        """The columns of an expert at the positions [start, stop)."""
        first, stride, position = self._places[chunk, use]
        column = first + expert * stride + start - position
        return range(column, column + stop - start)

    def _main_gates(self, mixture: Mixture, members: list[tuple[int, int]]) -> Tensor:  # [modules, columns]
        hidden, weights = [], []
        for i, use in members:
            chunk = self._batch.chunks[i]
            bound = _bound(chunk, use)
            hidden.append(chunk.sequence.scalings[bound.scaling].hidden(chunk.start, chunk.stop))
            weights += [bound.weight] * chunk.count
        scalings = mixture.head(torch.cat(hidden))  # [tokens, lora_layers, experts]
        self._keep_wanted(members, scalings)
        gates = mixture.gates(scalings[None, None], torch.ones(1))[:, :, 0]  # [modules, experts, tokens]
        return self._place(members, gates * torch.tensor(weights, device=gates.device))

    def _keep_wanted(self, members: list[tuple[int, int]], scalings: Tensor) -> None:
        """Keep the scalings of the chunks whose requests want them, in the order of their links."""
        offset = 0
        for i, use in members:
            chunk = self._batch.chunks[i]
            if chunk.wants_scalings:
                kept = self._batch.kept_scalings(i)
                kept[_binding(chunk).all_mixtures.index(_bound(chunk, use))] = scalings[offset : offset + chunk.count]
            offset += chunk.count

    def _pass_gates(self, mixture: Mixture, members: list[tuple[int, int]]) -> Tensor:  # [modules, columns]
        num_tokens = sum(self._batch.chunks[i].count for i, _ in members)
        return self._place(members, mixture.pass_gates(1, 1, num_tokens)[:, :, 0])

    def _place(self, members: list[tuple[int, int]], gates: Tensor) -> Tensor:
        num_tokens, offset = gates.shape[2], 0
        for i, use in members:
            chunk = self._batch.chunks[i]
            self._places[i, use] = (self._num_columns + offset, num_tokens, chunk.start)
            offset += chunk.count
        self._num_columns += gates.shape[1] * num_tokens
        return gates.flatten(1)


def _bound(chunk: ScheduledChunk, use: int) -> BoundMixture:
    return _binding(chunk).mixtures[use]


def _binding(chunk: ScheduledChunk) -> RequestAdapters:
    binding = chunk.sequence.state.binding
    assert binding is not None, "a sequence runs without its adapters"
    return binding
