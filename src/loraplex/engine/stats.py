"""What the engine holds and has done."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from loraplex.engine.durations import Durations
from loraplex.engine.sched.chunk import ScheduledChunk


@dataclass(kw_only=True)
class StepCounts:
    """Counted since the engine began."""

    num_steps: int = 0
    num_prompt_tokens: int = 0  # computed
    num_new_tokens: int = 0
    num_scaling_tokens: int = 0  # of scaling passes
    num_drafted: int = 0
    num_accepted: int = 0  # drafts that were the token chosen
    token_times: Durations = field(default_factory=Durations)  # between tokens of a sequence
    queue_times: Durations = field(default_factory=Durations)  # of requests, from arrival until they ran

    def add(self, chunks: Sequence[ScheduledChunk]) -> None:
        self.num_steps += 1
        for chunk in chunks:
            if chunk.scaling is not None:
                self.num_scaling_tokens += chunk.count
            else:
                self.num_new_tokens += chunk.wants_logits
                self.num_prompt_tokens += max(0, min(chunk.stop, chunk.sequence.num_prompt) - chunk.start)

    def add_draft(self, was_right: bool | None) -> None:
        """Count a draft that a token was compared with; None: there was none."""
        self.num_drafted += was_right is not None
        self.num_accepted += bool(was_right)

    def copy(self) -> "StepCounts":
        return replace(self, token_times=self.token_times.copy(), queue_times=self.queue_times.copy())


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """A snapshot of counters. Without requests nothing is held: all blocks are free or in the prefix cache."""

    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int
    num_blocks_held: int = 0
    num_passes: int = 0  # that hold a row of the block table
    num_preempted: int
    counts: StepCounts
