"""The states of all sequences beside their keys and values, and those that a pass changes."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import LinearAttentionLayer

from loraplex.engine.config import EngineConfig
from loraplex.engine.sched.chunk import ScheduledChunk
from loraplex.engine.worker.input_batch import InputBatch
from loraplex.engine.worker.state_probe import find_mixers
from loraplex.engine.worker.state_shapes import MixerShape, StateKey
from loraplex.errors import ConfigError

LEAST_SEQUENCES = 4  # that have room for their states: those of the check at start


@dataclass(frozen=True)
class Group:
    """Parts [first_part, stop_part) that a mixer runs in one call: single tokens, or a chunk by itself."""

    first_part: int
    stop_part: int
    start: int  # the first token's place in the batch
    stop: int
    rows: Tensor  # [chunks]
    is_new: bool  # begins without a state

    @property
    def is_single(self) -> bool:
        """One token for each chunk."""
        return self.stop - self.start == self.stop_part - self.first_part


class StatePool:
    """By state mixer, states [sequences, ...]: a sequence has the row that it has in the block table."""

    def __init__(self, shapes: dict[nn.Module, MixerShape], num_rows: int, device: torch.device) -> None:
        self.shapes = shapes
        self.num_rows = num_rows
        self.num_bytes = num_rows * sum(shape.sequence_bytes for shape in shapes.values())
        self.lengths = [0] * num_rows  # tokens that each row's states have seen
        # Not zeroed: a sequence begins without a state.
        self.states: dict[nn.Module, dict[StateKey, Tensor]] = {
            module: {
                key: torch.empty(num_rows, *size, dtype=dtype, device=device)
                for key, (size, dtype) in shape.states.items()
            }
            for module, shape in shapes.items()
        }


def make_states(base: PreTrainedModel, attention: Collection[nn.Module], config: EngineConfig) -> StatePool | None:
    """Room for the states of a model that keeps some, in up to half of `cache_bytes`.

    Raises ConfigError where not one sequence's fit there, and BaseModelError for states of an unknown form.
    """
    shapes = find_mixers(base, attention)
    if not shapes:
        return None
    track_bytes = sum(shape.sequence_bytes for shape in shapes.values())
    num_rows = min(max(2 * config.max_running, LEAST_SEQUENCES), config.cache_bytes // 2 // track_bytes)
    if num_rows < LEAST_SEQUENCES:
        raise ConfigError(
            f"cache_bytes is {config.cache_bytes}, half of which is for states, but this model keeps {track_bytes} "
            f"bytes of them for a sequence. Raise cache_bytes to at least {2 * LEAST_SEQUENCES * track_bytes}, so that "
            f"{LEAST_SEQUENCES} sequences have room."
        )
    return StatePool(shapes, num_rows, base.device)


def without_rollback(config: EngineConfig) -> EngineConfig:
    """What a model with states can do of a configuration: a state is that of all tokens so far, and can't go back.

    So a prefix's keys and values are of no use without its state, and a draft could not be undone.
    """
    return replace(config, prefix_cache=False, draft=False, cuda_graphs=False)


class PassStates:
    """The states that one pass reads, and those that it leaves; they are kept when all of it has run.

    A pass that fails has changed nothing, so its chunks can be run again.
    """

    def __init__(self, pool: StatePool, batch: InputBatch) -> None:
        self.groups = _groups(batch)
        self.num_tokens = batch.num_tokens
        self._pool = pool
        self._left: list[tuple[Tensor, Tensor, Tensor]] = []  # all sequences' states, rows, their new ones
        self._lengths = {chunk.kv.row: chunk.stop for chunk in batch.chunks}
        for chunk in batch.chunks:
            seen = pool.lengths[chunk.kv.row]
            assert chunk.start in (0, seen), f"a chunk begins at token {chunk.start}, but its state has seen {seen}"

    def shape_of(self, module: nn.Module) -> MixerShape:
        return self._pool.shapes[module]

    def begin(self, module: nn.Module, group: Group) -> LinearAttentionLayer:
        """The layer of a cache with the states of a group's chunks, which may be changed in place."""
        shape = self._pool.shapes[module]
        if group.is_new:
            return shape.new_layer()
        states = self._pool.states[module]
        return shape.new_layer({key: values.index_select(0, group.rows) for key, values in states.items()})

    def take(self, module: nn.Module, group: Group, layer: LinearAttentionLayer) -> None:
        """Note what a module has left of a group's states."""
        states = self._pool.states[module]
        for key, values in self._pool.shapes[module].states_of(layer).items():
            self._left.append((states[key], group.rows, values.to(states[key].dtype)))

    def keep(self) -> None:
        """The pass has run: its states are the sequences' now."""
        for states, rows, values in self._left:
            states.index_copy_(0, rows, values)
        self._left = []
        for row, length in self._lengths.items():
            self._pool.lengths[row] = length


def _groups(batch: InputBatch) -> list[Group]:
    """Single tokens that follow others in one group, every other chunk by itself."""
    num_going_on = sum(chunk.count == 1 and chunk.start > 0 for chunk in batch.chunks)
    groups = [_group(batch, 0, num_going_on)] if num_going_on else []
    return groups + [_group(batch, i, i + 1) for i in range(num_going_on, len(batch.chunks))]


def _group(batch: InputBatch, first: int, stop: int) -> Group:
    chunks: Sequence[ScheduledChunk] = batch.chunks[first:stop]
    return Group(
        first_part=first,
        stop_part=stop,
        start=batch.offsets[first],
        stop=batch.offsets[stop - 1] + chunks[-1].count,
        rows=torch.tensor([chunk.kv.row for chunk in chunks], device=batch.rows.device),
        is_new=chunks[0].start == 0,
    )
