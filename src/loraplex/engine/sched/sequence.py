"""One answer of a request while it is made."""

import time
from concurrent.futures import Future
from dataclasses import dataclass, field

from loraplex.adapters.names import AUTO
from loraplex.adapters.store.prepared import PreparedAdapter
from loraplex.adapters.vocabulary import Vocabulary
from loraplex.engine.kv.block_pool import BlockPool, BlockTable
from loraplex.engine.kv.sequence_kv import ExtraKey, LengthRule, SequenceKV, SequenceRoute
from loraplex.engine.request import Completion, FinishReason, Request
from loraplex.engine.sampling.detokenizer import Detokenizer
from loraplex.engine.sampling.logprobs import TokenLogprobs
from loraplex.engine.sampling.sampler import Sampler
from loraplex.engine.sched.captures import Captures, SequenceAttention
from loraplex.engine.sched.images import RequestImages
from loraplex.engine.sched.pooling import PooledPrompt
from loraplex.engine.sched.request_adapters import RequestAdapters
from loraplex.engine.sched.scaling_pass import SequenceScalingPass
from loraplex.errors import LoraplexError
from loraplex.models.auto.selection import AutoChoice
from loraplex.residual.operations import ChainOperations
from loraplex.residual.rows import RowAttention
from loraplex.routing.adapter_spec import Link

Pass = tuple[tuple[SequenceRoute, ...], tuple[ExtraKey, ...]]  # what its tokens go through, and what they depend on


@dataclass(eq=False, kw_only=True)
class RequestState:
    """A request in the engine. Its leases are shared by its answers and end with the last of them."""

    request_id: str
    request: Request
    link: Link
    prompt: tuple[int, ...]
    arrival: int
    max_new_tokens: int
    names: tuple[str, ...]  # of the adapters that must be in memory
    sequences: "list[SequenceState]" = field(default_factory=list)
    choosing: "SequenceState | None" = None  # of "auto": runs the base model on the prompt before all sequences
    auto: AutoChoice | None = None  # and what was then chosen
    binding: RequestAdapters | None = None
    loads: "list[Future[PreparedAdapter]] | None" = None  # futures of adapters that were asked for
    completions: list[Completion] = field(default_factory=list)
    num_cached_tokens: int = 0
    arrived_s: float = field(default_factory=time.perf_counter)
    queue_s: float | None = None  # until it ran; None: it hasn't
    vocabulary: Vocabulary | None = None  # that the prompt was read with; None: the base model's
    lengths: LengthRule = field(default_factory=LengthRule)  # what positions make of the sequence's length
    images: RequestImages | None = None

    @property
    def share(self) -> tuple[str, ...]:
        """Whose turn it counts against: requests with the same adapters share one."""
        return (AUTO,) if self.choosing is not None else tuple(name for name, _ in self.link)

    def note_cached(self, num_tokens: int) -> None:
        """So many of the prompt's keys and values were there when an answer began."""
        if self.auto is None or self.link:  # else the request's own pass left them, by which the base model was chosen
            self.num_cached_tokens = max(self.num_cached_tokens, num_tokens)

    @property
    def is_finished(self) -> bool:
        return len(self.completions) == self.request.sampling.n


class SequenceState:
    """Its tokens, and the passes over them once it runs."""

    def __init__(
        self,
        state: RequestState,
        index: int,
        sampler: Sampler,
        text: Detokenizer,
        captures: Captures | None = None,
    ) -> None:
        self.state = state
        self.index = index
        self.sampler = sampler
        self.text = text
        self.captures = captures  # None: it is asked for tokens alone
        pooling = state.request.pooling
        self.hidden = None if pooling is None else PooledPrompt(pooling)  # None: it is asked for tokens
        self.asked: SequenceAttention | None = None  # of its main pass, once it runs
        self.interventions: ChainOperations | None = None  # the same
        self.tokens = list(state.prompt)
        self.logprobs: list[TokenLogprobs] = []
        # Of the prompt's tokens, as far as they are known; None: they aren't wanted, or another answer has them.
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None
        if state.request.sampling.prompt_logprobs is not None and index == 0:
            self.prompt_logprobs = [None] * len(state.prompt)
        self.main: SequenceKV | None = None
        self.scalings: list[SequenceScalingPass] = []
        self.first_length = len(state.prompt)  # of the sequence in its first pass; each further token is one more
        self.finish_reason: FinishReason | None = None
        self.last_token_s: float | None = None  # when its last token was chosen

    @property
    def chooses(self) -> bool:
        """Whether its pass is there to choose the request's adapter, not to answer."""
        return self is self.state.choosing

    @property
    def num_prompt(self) -> int:
        return len(self.state.prompt)

    @property
    def new_tokens(self) -> list[int]:
        return self.tokens[self.num_prompt :]

    @property
    def num_new(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def kvs(self) -> list[SequenceKV]:
        main = [] if self.main is None else [self.main]
        return main + [scaling.kv for scaling in self.scalings]

    @property
    def holds_blocks(self) -> bool:
        return self.main is not None

    def passes(self, binding: RequestAdapters) -> list[Pass]:
        """What its passes go through: the main one, then the scaling passes. Takes nothing yet."""
        prompt, request = self.state.prompt, self.state.request
        self.first_length = self.state.lengths.first_length(len(prompt), len(self.tokens))
        salt = [*_salt_keys(request), *self.state.lengths.keys(self.first_length)]
        if self.state.images is not None:
            salt += self.state.images.keys
        if self.chooses:
            return [((), tuple(salt))]
        if self.asked is None:
            row = RowAttention(chain=binding.attention_chain, capture=request.capture, steering=request.steering)
            buffer = None if self.captures is None else self.captures.buffer
            self.asked = SequenceAttention(row=row, buffer=buffer) if row.asks else None
        self.interventions = binding.interventions
        keys = [*salt, *binding.main_keys(prompt), *_steering_keys(request)]
        scalings = zip(binding.scaling_routes, binding.scaling_keys, strict=True)
        return [
            (tuple(binding.main_routes(prompt)), tuple(keys)),
            *((routes, (*salt, *scaling_keys)) for routes, scaling_keys in scalings),
        ]

    def begin(self, passes: list[Pass], pool: BlockPool, table: BlockTable, *, reuse: bool) -> None:
        """Make the passes; with `reuse`, from what the prefix cache knows. The last token is always computed."""
        (main_routes, main_keys), *scalings = passes
        self.main = SequenceKV(self.tokens, main_routes, main_keys, pool, table)
        if reuse:
            self.main.reuse(self.most_reused)
        for routes, keys in scalings:
            kv = SequenceKV(self.tokens, routes, keys, pool, table)
            if reuse:
                kv.reuse(self.main.num_computed)
            self.scalings.append(SequenceScalingPass(kv, needs_from=self.main.num_computed))

    @property
    def is_outgrown(self) -> bool:
        """Whether its passes have to begin anew, as positions changed for all its tokens with the last one."""
        first = self.state.lengths.first_length(self.num_prompt, len(self.tokens))
        return self.holds_blocks and self.state.lengths.keys(first) != self.state.lengths.keys(self.first_length)

    @property
    def most_reused(self) -> int:
        """How many tokens the main pass may take from the prefix cache: not the last, nor what is still to be seen."""
        if self.chooses:
            return len(self.tokens) - 1
        if self.prompt_logprobs is not None:
            return 0
        if self.hidden is not None:
            return self.hidden.most_reused(len(self.tokens) - 1)
        if self.captures is None:
            return len(self.tokens) - 1
        mixtures = () if self.state.binding is None else self.state.binding.all_mixtures
        return self.captures.most_reused(len(self.tokens) - 1, mixtures)

    def drop_passes(self) -> None:
        """Give blocks and table rows back; tokens and their text stay."""
        for kv in self.kvs:
            kv.close()
        self.main, self.scalings = None, []

    def completion(self, reason: FinishReason, error: LoraplexError | None = None) -> Completion:
        """What its request's result has of it; what it observed is given away. Raises ScalingsError."""
        wants_logprobs = self.state.request.sampling.logprobs is not None
        observed, self.captures, self.asked, self.interventions = self.captures, None, None, None
        mixtures = () if self.state.binding is None else self.state.binding.all_mixtures
        return Completion(
            index=self.index,
            text=self.text.total,
            token_ids=tuple(self.new_tokens),
            finish_reason=reason,
            logprobs=tuple(self.logprobs) if wants_logprobs else None,
            error=error,
            capture=None if observed is None else observed.capture(self.tokens),
            scalings=None if observed is None else observed.scalings(self.tokens, mixtures),
            embedding=None if self.hidden is None or reason != "stop" else self.hidden.pooled(),
        )


def _salt_keys(request: Request) -> list[ExtraKey]:
    return [ExtraKey(identity=("salt", request.cache_salt))] if request.cache_salt else []


def _steering_keys(request: Request) -> list[ExtraKey]:
    """Tokens before the first span see nothing of the steering."""
    steerings = tuple(steering for steering in request.steering if steering.changes)
    if not steerings:
        return []
    first = min(start for steering in steerings for start, _ in steering.spans)
    return [ExtraKey(identity=("steering", steerings), active_from=first)]
