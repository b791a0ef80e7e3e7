"""Steps of single tokens, recorded as CUDA graphs for padded batch sizes and replayed.

A step of decoding launches some thousand small kernels, which takes the host longer than the device. A graph launches
them all at once, but always with the same tensors: so a step runs on static ones (StaticBatch, StaticPlan), which are
filled before each replay. What a graph can't hold runs as any other pass.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from loraplex.engine.kv.kv_cache import KeyValueCache
from loraplex.engine.worker.cuda_graphs_batch import StaticBatch
from loraplex.engine.worker.cuda_graphs_plan import StaticPlan, StaticRouting
from loraplex.engine.worker.input_batch import InputBatch, forward_context
from loraplex.residual.scope import use_attention
from loraplex.routing.plan import RoutingPlan
from loraplex.routing.routing import use_routing
from loraplex.routing.weight_provider import WeightProvider

logger = logging.getLogger(__name__)

Step = Callable[[], None]
Recorder = Callable[[Step], Step]  # runs a step on its static tensors; returns what runs it again

# Rows of a step that is recorded: a kernel of more of them runs longer than the host takes to launch one, some 5 us, on
# any device that runs these models at all, so that recording brings nothing.
_LARGEST_SIZE = 256
_FEWEST_BLOCKS = 8
_MAX_GRAPHS = 64


class Shape(NamedTuple):
    """What a recorded step is made for."""

    size: int
    num_key_blocks: int
    capacity: int  # gates; 0: no row has adapters, and no kernel for them is launched


class RecordingError(RuntimeError):
    """A step can't be recorded."""


class RecordedStep:
    """One step on static tensors, and what replays it."""

    def __init__(self, base: PreTrainedModel, batch: StaticBatch, plan: StaticPlan, *, fast_decode: bool) -> None:
        self.batch, self.plan = batch, plan
        self.logits: Tensor | None = None  # [size, vocab]
        self.hidden: Tensor | None = None  # [size, hidden]
        self._base = base
        self._routing = StaticRouting(plan, fast_decode=fast_decode)
        self._replay: Step | None = None

    def run(self, batch: InputBatch, plan: RoutingPlan, record: Recorder) -> tuple[Tensor, Tensor]:
        """The logits and the decoder's hidden states of a pass, as copies: the next replay overwrites its own."""
        self.batch.fill(batch)
        self.plan.fill(plan)
        if self._replay is None:
            try:
                self._replay = record(self._step)
            except RuntimeError as error:
                raise RecordingError(f"{type(error).__name__}: {error}") from error
        self._replay()
        assert self.logits is not None, "a recorded step has left no logits"
        assert self.hidden is not None, "a recorded step has left no hidden states"
        return self.logits[: batch.num_tokens].clone(), self.hidden[: batch.num_tokens].clone()

    def _step(self) -> None:
        self.batch.begin()
        with use_routing(self._routing), forward_context(self.batch), use_attention(None):
            output = self._base(
                input_ids=self.batch.token_ids.unsqueeze(0),
                position_ids=self.batch.position_ids.unsqueeze(0),
                use_cache=False,
            )
        hidden = self.batch.last_hidden
        assert hidden is not None, "the decoder's hidden states were not kept"
        if self.logits is None or self.hidden is None:
            self.logits, self.hidden = torch.empty_like(output.logits[0]), torch.empty_like(hidden)
        self.logits.copy_(output.logits[0])
        self.hidden.copy_(hidden)


class DecodeGraphs:
    """The recorded steps of one engine.

    Modules that adapters adapt, and their largest rank, are those seen so far: a batch that has others drops the
    recorded steps, which are then recorded again as they are needed.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        cache: KeyValueCache,
        bank: WeightProvider,
        *,
        row_blocks: int,
        embeddings: frozenset[int],  # modules that look their input up
        experts: frozenset[int],  # stacked feed-forward experts
        fast_decode: bool,
        record: Recorder,
    ) -> None:
        self._base, self._cache, self._bank = base, cache, bank
        self._row_blocks, self._embeddings, self._fast_decode = row_blocks, embeddings, fast_decode
        self._experts = experts
        self._record = record
        self._steps: OrderedDict[Shape, RecordedStep] = OrderedDict()
        self._modules: frozenset[int] = frozenset()
        self._max_rank = 16
        self._refusals: set[str] = set()
        self._broken: str | None = None
        self.num_recorded = self.num_replayed = 0

    def run(self, batch: InputBatch, plan: RoutingPlan) -> tuple[Tensor, Tensor] | None:
        """Logits [tokens, vocab] and hidden states of a pass; None if it must run without a graph, which is logged."""
        reason = self.obstacle(batch, plan)
        if reason is None:
            step = self._step(batch, plan)
            try:
                result = step.run(batch, plan, self._record)
            except RecordingError as error:  # something in the model can't be recorded: never try again
                self._steps.clear()
                reason = self._broken = f"recording failed, {error}"
            else:
                self.num_replayed += 1
                return result
        if reason not in self._refusals:
            self._refusals.add(reason)
            logger.info("a pass runs without a CUDA graph: %s", reason)
        return None

    def obstacle(self, batch: InputBatch, plan: RoutingPlan) -> str | None:
        """Why a pass can't run as a graph; None if it can."""
        if self._broken is not None:
            return self._broken
        if batch.num_single < batch.num_tokens:
            return "it reads parts of prompts, whose lengths vary"
        if batch.asking:
            return "rows have residuals, captures or steering, which are planned for each pass"
        if any(chunk.wants_all_logits for chunk in batch.chunks):
            return "logits of prompts are wanted"
        if batch.num_tokens > _LARGEST_SIZE:
            return f"it has more than {_LARGEST_SIZE} rows"
        if plan.is_routed:
            return "a mixture's router chooses gates in each layer"
        if plan.has_dora_scales:
            return "a DoRA adapter adds a share of the base output, row by row"
        if plan.has_changes:
            return "an adapter changes modules' own weights, row by row"
        if plan.adapted & self._embeddings:
            return "an adapter adapts an embedding, row by row"
        if plan.adapted & self._experts:
            return "an adapter adapts feed-forward experts, whose tokens are counted on the host"
        probe = torch.empty(0, dtype=self._cache.dtype, device=batch.token_ids.device)
        if plan.adapted and plan.kernel(probe, needs_grad=False) not in ("triton", "native"):
            return "the torch kernels run the adapters, with shapes that depend on the batch"
        return None

    def _step(self, batch: InputBatch, plan: RoutingPlan) -> RecordedStep:
        max_rank = max((self._bank.max_rank(slot) for slot in {s.slot for s in plan.segments}), default=0)
        if not plan.adapted <= self._modules or max_rank > self._max_rank:
            self._modules |= plan.adapted
            self._max_rank = max(self._max_rank, _power_of_two(max_rank))
            self._steps = OrderedDict((shape, step) for shape, step in self._steps.items() if shape.capacity == 0)
        shape = self.shape_of(batch, plan)
        step = self._steps.pop(shape, None)
        if step is None:
            step = self._make(shape, batch)
            self.num_recorded += 1
            while len(self._steps) >= _MAX_GRAPHS:
                self._steps.popitem(last=False)
        self._steps[shape] = step
        return step

    def shape_of(self, batch: InputBatch, plan: RoutingPlan) -> Shape:
        """The padded shape of a pass."""
        size = padded_size(batch.num_tokens)
        num_gates = plan.gates.all().shape[-1]
        return Shape(
            size=size,
            num_key_blocks=min(self._row_blocks, max(_FEWEST_BLOCKS, _power_of_two(batch.num_key_blocks))),
            capacity=max(size, _power_of_two(num_gates)) if num_gates else 0,
        )

    def _make(self, shape: Shape, batch: InputBatch) -> RecordedStep:
        plan = StaticPlan(
            shape.size,
            shape.capacity,
            self._bank,
            modules=self._modules if shape.capacity else frozenset(),
            max_rank=self._max_rank,
            fast_decode=self._fast_decode,
        )
        static = StaticBatch(shape.size, shape.num_key_blocks, self._cache, batch)
        return RecordedStep(self._base, static, plan, fast_decode=self._fast_decode)


class GraphRecorder:
    """Records steps as CUDA graphs, whose temporary memory they share: one runs at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Step) -> Step:
        current, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            for _ in range(2):  # compiles and tunes kernels, and sees which modules share their input
                step()
        current.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # Other threads may load adapters meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            step()
        return graph.replay


def run_again(step: Step) -> Step:
    """Record nothing: on a CPU, a replay is the same step on the same tensors."""
    return step


def padded_size(num_tokens: int) -> int:
    """The number of rows that a pass of single tokens is padded to: 1, 2, 4, 8, 16, then multiples of 16."""
    return _power_of_two(num_tokens) if num_tokens <= 16 else -(-num_tokens // 16) * 16


def _power_of_two(number: int) -> int:
    """The smallest one that is not below."""
    return 1 << max(0, number - 1).bit_length()
