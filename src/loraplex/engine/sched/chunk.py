"""What the scheduler gives a forward pass: some tokens of one sequence."""

from dataclasses import dataclass

from loraplex.engine.kv.sequence_kv import SequenceKV
from loraplex.engine.sched.captures import SequenceAttention
from loraplex.engine.sched.images import RequestImages
from loraplex.engine.sched.scaling_pass import SequenceScalingPass
from loraplex.engine.sched.sequence import SequenceState
from loraplex.residual.operations import ChainOperations


@dataclass(frozen=True, eq=False, kw_only=True)
class ScheduledChunk:
    """Some tokens of one sequence, in one forward pass."""

    kv: SequenceKV
    start: int  # position of the first token
    count: int
    wants_logits: bool  # of the last token
    wants_all_logits: bool = False  # of every token
    is_pooled: bool = False  # a prompt that is wanted as a vector
    owner: SequenceState | None = None  # None: a trial
    scaling: SequenceScalingPass | None = None  # None: the main pass
    offset: int = 0  # a trial's: what the model is told that its positions are beyond their places in the sequence

    @property
    def sequence(self) -> SequenceState:
        assert self.owner is not None, "a trial's chunk was taken for a sequence's"
        return self.owner

    @property
    def asked(self) -> SequenceAttention | None:
        """What it asks of attention: main passes alone can."""
        return None if self.owner is None or self.scaling is not None else self.owner.asked

    @property
    def wants_hidden(self) -> bool:
        """Whether the last hidden states of its tokens are wanted."""
        return self.is_pooled or self.scaling is not None or (self.owner is not None and self.owner.chooses)

    @property
    def wants_scalings(self) -> bool:
        """Whether its request wants to know what mixtures predict for its tokens."""
        if self.owner is None or self.scaling is not None or self.owner.captures is None:
            return False
        return self.owner.captures.wants_scalings

    @property
    def images(self) -> RequestImages | None:
        """Those of its sequence."""
        return None if self.owner is None else self.owner.state.images

    @property
    def interventions(self) -> ChainOperations | None:
        """What its tokens go through besides adapters: main passes alone can."""
        return None if self.owner is None or self.scaling is not None else self.owner.interventions

    @property
    def stop(self) -> int:
        return self.start + self.count

    @property
    def lengths(self) -> list[int]:
        """How long each token's sequence was when its position was told: see rotary.py. A trial is a prompt."""
        first = len(self.kv.tokens) + self.offset if self.owner is None else self.owner.first_length
        return [max(first, position + 1) for position in range(self.start + self.offset, self.stop + self.offset)]

    @property
    def num_logits(self) -> int:
        return self.count if self.wants_all_logits else int(self.wants_logits)

    @property
    def tokens(self) -> list[int]:
        if self.scaling is None or self.stop <= len(self.kv.tokens):
            return self.kv.tokens[self.start : self.stop]
        return [self.scaling.token_at(position) for position in range(self.start, self.stop)]
